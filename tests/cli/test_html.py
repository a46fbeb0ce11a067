"""`--html` of `gpt2 verify` and `gpt2 diff`: files, flags and exit codes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support.commands import needs_torch, run
from support.html_pages import parse_page
from support.models import SMALLEST, huggingface_directory, random_state

import bridge
from bridge import BUNDLED, Checkpoint

CERTIFICATE = BUNDLED / "parity.certificate"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return huggingface_directory(tmp_path / "model", SMALLEST)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    state = random_state(SMALLEST)
    state["wte.weight"][3] += 1
    bridge.save(Checkpoint.of(state, SMALLEST), tmp_path / "other", format="huggingface")
    return tmp_path / "other"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    return capsys.readouterr().err


def test_diff_writes_a_page_and_keeps_its_exit_codes(model: Path, other: Path, tmp_path: Path) -> None:
    page = tmp_path / "diff.html"
    assert run("diff", model, model, "--html", page) == 0
    identical = page.read_bytes()
    assert parse_page(identical.decode()).of_class("verdict")[0].text.startswith("✓ Identical")
    flags = ("--no-function", "--html", page, "--json", tmp_path / "diff.json", "--overwrite")
    assert run("diff", model, other, *flags) == 1
    parsed = parse_page(page.read_text())
    assert parsed.of_class("verdict")[0].text == "✗ Different: tensors."
    stored = json.loads((tmp_path / "diff.json").read_text())
    assert stored["a"]["fingerprint"] in parsed.all("main")[0].text
    assert run("diff", model, model, "--html", page, "--overwrite") == 0
    assert page.read_bytes() == identical


@needs_torch
def test_verify_writes_a_page_and_keeps_its_exit_codes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, checks = tmp_path / "report.html", ("--checks", "round-trip")
    assert run("verify", model, *checks, "--html", page) == 0
    assert parse_page(page.read_text()).of_class("verdict")[0].text == "✓ 1 check holds."
    right = bridge.to_torch
    monkeypatch.setattr(bridge, "to_torch", lambda *a, **k: {n: np.asarray(t) * 2 for n, t in right(*a, **k).items()})
    assert run("verify", model, *checks, "--html", page, "--overwrite") == 1
    assert parse_page(page.read_text()).of_class("verdict")[0].text.startswith("✗ NOT the same function")


def test_verify_against_a_certificate_writes_a_page(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert run("verify", "--against", CERTIFICATE, "--checks", "weights", "configuration", "--html", page) == 0
    assert parse_page(page.read_text()).of_class("verdict")[0].text == "✓ 2 checks hold."


AGAINST = ("verify", "--against", CERTIFICATE, "--checks", "configuration")


@pytest.mark.parametrize("verb", [AGAINST, ("diff", "bundled", "bundled")], ids=["verify", "diff"])
def test_only_a_page_of_an_earlier_command_is_replaced(
    verb: Sequence[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, foreign = tmp_path / "page.html", tmp_path / "foreign.html"
    assert run(*verb, "--html", page) == 0
    assert "replace an earlier report with --overwrite" in refusal(capsys, *verb, "--html", page)
    assert run(*verb, "--html", page, "--overwrite") == 0
    text = '<!doctype html>\n<html lang="en">\n<meta name="generator" content="gpt2-bridge 1">'
    foreign.write_text(text)
    assert "is not a report of this command" in refusal(capsys, *verb, "--html", foreign, "--overwrite")
    assert foreign.read_text() == text
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "foreign.html"}


@pytest.mark.parametrize("verb", [AGAINST, ("diff", "bundled", "bundled")], ids=["verify", "diff"])
def test_bad_paths_are_refused_before_the_work_starts(
    verb: Sequence[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert "--html and --json both name" in refusal(capsys, *verb, "--html", page, "--json", page)
    assert "the name must end in .html or .htm" in refusal(capsys, *verb, "--html", tmp_path / "page.txt")
    assert "give a file in a directory that exists" in refusal(capsys, *verb, "--html", tmp_path / "no" / "page.html")
    assert "--overwrite: has no effect without --json" in refusal(capsys, *verb, "--overwrite")
    assert not [*tmp_path.iterdir()]


@needs_torch
def test_a_certificate_and_a_page_are_two_files(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.html"
    message = refusal(capsys, "verify", model, "--certificate", file, "--html", file)
    assert "--certificate and --html both name" in message

"""`gpt2 verify --certificate` and `--against`: files, flags, exit codes and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.commands import needs_torch, run
from support.models import SMALLEST, huggingface_directory
from support.signing_keys import write_keys

from bridge import BUNDLED
from gpt2_jax.cli.verbs.verify import ALL_CERTIFIED_CHECKS
from gpt2_jax.parity import CERTIFIED_CHECKS, Check, Measurement, Report, read_certificate

CERTIFICATE = BUNDLED / "parity.certificate"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return huggingface_directory(tmp_path / "model", SMALLEST)


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Replace `verify` and `verify_against` by functions whose results are in the returned dictionary."""
    from gpt2_jax.parity.certificates import certification

    passed = {"verify": True, "verify_against": True}

    def report(name: str) -> Report:
        return Report("x", {}, (Check(name, (Measurement("difference", 0.5, float(passed[name])),)),))

    for name in passed:
        monkeypatch.setattr(certification, name, lambda *args, name=name, **options: report(name))
    return passed


@needs_torch
def test_a_certificate_is_written_if_all_checks_pass(
    model: Path, tmp_path: Path, reports: dict[str, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    assert run("verify", model, "--certificate", file) == 0
    assert f"{file}', {file.stat().st_size:,} bytes" in capsys.readouterr().out
    measured = read_certificate(file).measured
    assert [measured[name][0]["name"] for name in ("verify", "against")] == ["verify", "verify_against"]
    assert run("verify", model, "--against", file, "--checks", "weights", "configuration") == 0


@needs_torch
@pytest.mark.parametrize("failing", ["verify", "verify_against"])
def test_nothing_is_written_if_a_check_fails(
    model: Path, tmp_path: Path, reports: dict[str, bool], failing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reports[failing] = False
    assert run("verify", model, "--certificate", tmp_path / "file") == 1
    assert f"Failed: {failing}" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@needs_torch
def test_only_an_earlier_certificate_is_overwritten(
    model: Path, tmp_path: Path, reports: dict[str, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    file, thesis = tmp_path / "file", tmp_path / "thesis"
    thesis.write_text("years of work")
    assert run("verify", model, "--certificate", file) == 0
    before = file.read_bytes()
    assert run("verify", model, "--certificate", file) == 2
    assert "replace an earlier certificate with --overwrite" in capsys.readouterr().err
    assert run("verify", model, "--certificate", thesis, "--overwrite") == 2
    assert "is not a certificate of this command and was not replaced" in capsys.readouterr().err
    assert (thesis.read_text(), file.read_bytes()) == ("years of work", before)
    assert run("verify", model, "--certificate", file, "--overwrite", "--seed", 1) == 0
    assert file.read_bytes() != before


@needs_torch
def test_a_certificate_and_its_checkpoint_are_signed_and_verified(
    model: Path, tmp_path: Path, reports: dict[str, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("model_signing", reason="the package model-signing is not installed")
    (private, public), (other, _) = write_keys(tmp_path, "key"), write_keys(tmp_path, "other")
    file = model / "parity.certificate"
    sign = ("verify", model, "--certificate", file, "--json", model / "report.json", "--signing-key")
    check = ("verify", model, "--against", file, "--checks", "weights", "configuration", "--public-key", public)

    assert run(*sign, private) == 0
    assert {f"{file}.sig", f"{file}.checkpoint.sig"} <= {str(path) for path in model.iterdir()}
    assert run(*check) == 0
    assert capsys.readouterr().out.count(": valid") == 2

    assert run(*sign, other, "--overwrite") == 2  # not with another key
    assert "is not a signature of this command and was not replaced" in capsys.readouterr().err
    assert run(*sign, private, "--overwrite") == 0
    (model / "report.json").unlink()  # not signed
    assert run(*check) == 0

    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config + " ")
    assert run(*check) == 2
    assert "does not have the signature" in capsys.readouterr().err
    (model / "config.json").write_text(config)
    Path(f"{file}.checkpoint.sig").unlink()
    assert run(*check) == 2
    assert "No such file" in capsys.readouterr().err


@needs_torch
def test_a_failed_check_signs_nothing(model: Path, tmp_path: Path, reports: dict[str, bool]) -> None:
    pytest.importorskip("model_signing", reason="the package model-signing is not installed")
    reports["verify"] = False
    private, _ = write_keys(tmp_path, "key")
    before = sorted(tmp_path.rglob("*"))
    assert run("verify", model, "--certificate", tmp_path / "x", "--signing-key", private) == 1
    assert sorted(tmp_path.rglob("*")) == before


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "both": (("--certificate", "x", "--against", str(CERTIFICATE)), "mutually exclusive"),
    "some checks": (("--certificate", "x", "--checks", "logits"), "--certificate needs all checks"),
    "text": (("--against", str(CERTIFICATE), "--text", "a"), "--text: has no effect with --against"),
    "length": (("--against", str(CERTIFICATE), "--seq-len", "9"), "--seq-len: has no effect with --against"),
    "no such check": (("--against", str(CERTIFICATE), "--checks", "training"), "--checks training: with --against"),
    "no certificate": (("--checks", "weights"), "--checks weights: without --against"),
    "precision": (("--precision", "high"), "--precision: has no effect without --against"),
    "signing key": (("--against", str(CERTIFICATE), "--signing-key", "x"), "--signing-key: has no effect without"),
    "public key": (("--public-key", "x"), "--public-key: has no effect without --against"),
    "no such key": (("--certificate", "{tmp}/x", "--signing-key", "{tmp}/y"), "is not an unencrypted private key"),
    "no checks": (("--against", str(CERTIFICATE), "--checks"), "needs at least one of weights"),
    "another model": (("--against", str(CERTIFICATE)), "vocab_size=11 instead of 1024"),
    "the same file": (("--certificate", "{tmp}/x", "--json", "{tmp}/x"), "give two files"),
    "weights": (("--against", "{tmp}/model/model.safetensors"), "is not a certificate"),
    "the report": (("--against", "{tmp}/model/config.json", "--json", "{tmp}/model/config.json"), "is read by this"),
    "too large": (("--certificate", "{tmp}/x", "--batch-size", "100000"), "use fewer sequences"),
}


@needs_torch
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_exits_with_2(case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, message = REFUSED[case]
    before = sorted(tmp_path.rglob("*"))
    assert run("verify", model, *(flag.format(tmp=tmp_path) for flag in flags)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_the_report_has_the_keys_of_verify(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    checks = ("--checks", "weights", "configuration")
    assert run("verify", "--against", CERTIFICATE, *checks, "--precision", "high", "--json", file) == 0
    report: dict[str, Any] = json.loads(file.read_text())
    about = {"config", "fingerprint", "environment"}
    assert set(report) == {"generator", "source", "details", "diagnostics", "passed", "checks", *about}
    assert set(report["details"]) == {"model", "tokens", "certificate", "float32"}
    assert "at precision high" in report["details"]["float32"]
    for check in report["checks"]:
        assert set(check) == {"name", "measurements", "note", "first_divergence", "plots", "passed", "skipped"}
        assert set(check["measurements"][0]) == {"name", "value", "tolerance", "location", "passed"}


def test_a_failed_check_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in BUNDLED.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-6}))
    assert run("verify", tmp_path, "--against", CERTIFICATE, "--checks", "weights", "configuration") == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "NOT the certified function. Failed: configuration." in printed
    assert "layer_norm_epsilon=1e-06" in printed


def test_the_verb_accepts_exactly_the_existing_checks() -> None:
    assert tuple(CERTIFIED_CHECKS) == ALL_CERTIFIED_CHECKS

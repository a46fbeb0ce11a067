"""`--source-activation`, on every verb that reads a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.commands import CONFIG, needs_torch, run
from support.models import random_checkpoint
from support.tokenizers_for_tests import write_byte_tokenizer

import bridge
from bridge import BridgeError, Checkpoint
from gpt2_jax.cli import run_training as train_verb
from gpt2_jax.training import PRESETS, TrainConfig
from gpt2_jax.training.config import flat, from_flat
from gpt2_jax.training.run.identity import RENAMED_SINCE_1, migrated

EXACT = replace(CONFIG, n_inner=None, activation_function="gelu")
ASSUMED = "the file does not state its activation; it was read with the exact GELU (gelu)"
NO_FLAG: tuple[str, ...] = ()
CASES = pytest.mark.parametrize(
    ("flag", "activation", "is_assumed"),
    [(NO_FLAG, "gelu", True), (("--source-activation", "gelu_new"), "gelu_new", False)],
    ids=["not given", "given"],
)


@pytest.fixture
def nanogpt(tmp_path: Path) -> Path:
    """A nanoGPT file in a directory with a tokenizer."""
    bridge.save(random_checkpoint(EXACT), tmp_path / "nano" / "ckpt.pt", format="nanogpt")
    write_byte_tokenizer(tmp_path / "nano")
    return tmp_path / "nano" / "ckpt.pt"


def facts(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@CASES
def test_inspect_and_convert_report_the_assumed_activation(
    nanogpt: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flag: tuple[str, ...],
    activation: str,
    is_assumed: bool,
) -> None:
    assert run("inspect", nanogpt, *flag, "--json", tmp_path / "facts.json") == 0
    assert facts(tmp_path / "facts.json")["config"]["activation_function"] == activation
    assert any(ASSUMED in line for line in facts(tmp_path / "facts.json")["diagnostics"]) is is_assumed
    capsys.readouterr()
    assert run("convert", nanogpt, tmp_path / "out", "--to", "flax", *flag, "--json", tmp_path / "done.json") == 0
    assert bridge.load(tmp_path / "out").config.activation_function == activation
    assert any(ASSUMED in line for line in facts(tmp_path / "done.json")["diagnostics"]) is is_assumed
    assert (f"warning: {ASSUMED}" in capsys.readouterr().out) is is_assumed


def test_the_activation_flag_of_convert_sets_that_of_the_target(nanogpt: Path, tmp_path: Path) -> None:
    flags = ("--source-activation", "gelu_new", "--activation", "gelu")
    assert run("convert", nanogpt, tmp_path / "out", "--to", "nanogpt", *flags) == 0
    assert bridge.load(tmp_path / "out").config.activation_function == "gelu"


@needs_torch
@CASES
def test_verify_reports_the_assumed_activation(
    nanogpt: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flag: tuple[str, ...],
    activation: str,
    is_assumed: bool,
) -> None:
    options = ("--checks", "round-trip", "--seq-len", 4, "--json", tmp_path / "report.json")
    assert run("verify", nanogpt, *flag, *options) == 0
    assert any(ASSUMED in line for line in facts(tmp_path / "report.json")["diagnostics"]) is is_assumed
    assert ("warning: the file does not state its activation" in capsys.readouterr().out) is is_assumed


@needs_torch
def test_eval_and_generate_use_the_given_activation(nanogpt: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("We predict this text.")
    losses, logprobs = {}, {}
    for activation in ("gelu", "gelu_new"):
        flags = (
            "--backend",
            "torch",
            "--source-activation",
            activation,
            "--json",
            tmp_path / "found.json",
            "--overwrite",
        )
        assert run("eval", nanogpt, "--data", tmp_path / "text.txt", *flags) == 0
        losses[activation] = facts(tmp_path / "found.json")["loss"]
        assert run("generate", nanogpt, "We", "--max-new-tokens", 2, *flags) == 0
        logprobs[activation] = json.dumps(facts(tmp_path / "found.json")["completions"])
    assert losses["gelu"] != losses["gelu_new"]
    assert logprobs["gelu"] != logprobs["gelu_new"]


def test_train_starts_with_the_given_activation(
    nanogpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[tuple[TrainConfig, Checkpoint]] = []

    def stop(config: TrainConfig, out: Path, data: Any, *, init_from: Checkpoint, **_: Any) -> None:
        begun.append((config, init_from))
        raise BridgeError("enough")

    monkeypatch.setattr(train_verb, "train", stop)
    (tmp_path / "text.txt").write_text("We train on this text.\n" * 200)
    places = ("--data", tmp_path / "text.txt", "--cache", tmp_path / "cache", "--out", tmp_path / "run", "--seq-len", 8)
    for flag in (NO_FLAG, ("--source-activation", "gelu_new")):
        assert run("train", "--init-from", nanogpt, *places, *flag) == 2
    assert [config.model.activation_function for config, _ in begun] == ["gelu", "gelu_new"]
    assert [init_from.config.activation_function for _, init_from in begun] == ["gelu", "gelu_new"]
    assert capsys.readouterr().out.count(f"warning: {ASSUMED}") == 1


def test_train_without_a_checkpoint_refuses_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--out", tmp_path / "run", "--source-activation", "gelu") == 2
    assert "source_activation='gelu': is only for --init-from" in capsys.readouterr().err


def test_a_run_stored_before_the_flag_existed_is_read() -> None:
    """`tests/training/test_old_runs.py` reads such a run from its files."""
    old_name = {new: old for old, new in RENAMED_SINCE_1.items()}
    stored = {old_name.get(name, name): value for name, value in flat(PRESETS["nano"]).items()}
    del stored["source_activation"]
    assert from_flat(migrated(stored)) == PRESETS["nano"]


@pytest.mark.parametrize("verb", ["inspect", pytest.param("verify", marks=needs_torch), "eval", "generate", "convert"])
def test_a_source_that_states_its_activation_is_refused(
    verb: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"convert": (tmp_path / "out", "--to", "flax"), "generate": ("We",)}.get(verb, ())
    before = sorted(tmp_path.rglob("*"))
    assert run(verb, model, *arguments, "--source-activation", "gelu_new") == 2
    assert "activation='gelu_new' was given, but huggingface files state their activation" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before

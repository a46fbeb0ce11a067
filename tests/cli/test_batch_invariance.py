"""`gpt2 generate --batch-invariant` and `gpt2 verify --checks batch-invariance`, in processes with one thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import needs_torch, run
from support.models import random_checkpoint

import gpt2_jax
from bridge import GPT2Config
from gpt2_jax.parity import verify

pytestmark = pytest.mark.usefixtures("batch_invariance")


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `gpt2 ARGUMENTS` in a process of its own, with the number of threads that the command chooses."""
    environment = {name: value for name, value in os.environ.items() if name != "NPROC"}
    words = [sys.executable, "-c", "from gpt2_jax.cli import main; main()", *map(str, arguments)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.thorough
def test_a_prompt_has_the_same_bits_alone_and_among_others(model: Path, tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("We hold these truths\nWe\nHe has\n")
    found: dict[str, dict[str, Any]] = {}
    for name, prompts in {"alone": ["We"], "among others": ["--lines", str(tmp_path / "lines")]}.items():
        file = tmp_path / f"{name}.json"
        done = command("generate", model, *prompts, "--batch-invariant", "--max-new-tokens", 8, "--json", file)
        assert done.returncode == 0, done.stderr
        completions = json.loads(file.read_text())["completions"]
        [found[name]] = [completion for completion in completions if completion["prompt"] == "We"]
    assert found["alone"] == found["among others"]
    assert len(found["alone"]["logprobs"]) == 8


@pytest.mark.thorough
@needs_torch
def test_verify_runs_the_check_if_it_is_named(model: Path) -> None:
    done = command("verify", model, "--checks", "batch-invariance")
    assert done.returncode == 0, done.stdout + done.stderr
    for comparison in ("alone vs in a batch", "uncached vs cached"):
        assert comparison in " ".join(done.stdout.split())


def test_other_log_probabilities_fail_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC", "1")
    right = gpt2_jax.Decoder.token_logprobs

    def wrong(self: gpt2_jax.Decoder, rows: Any) -> list[np.ndarray]:
        return [np.nextafter(row, np.float32(0)) for row in right(self, rows)]

    monkeypatch.setattr(gpt2_jax.Decoder, "token_logprobs", wrong)
    checkpoint = random_checkpoint(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    [check] = verify(checkpoint, checks=["batch-invariance"]).checks
    assert [m.value for m in check.measurements] == [0, 4, 0, 4]
    assert not check.passed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--backend", "torch"), "--batch-invariant: has no effect without --backend jax"),
        ((), "set NPROC=1 in the environment before JAX starts"),
    ],
    ids=["torch", "several threads"],
)
def test_flags_that_do_not_hold_are_refused(
    flags: tuple[str, ...],
    message: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("NPROC", raising=False)
    assert run("generate", model, "We", "--batch-invariant", *flags) == 2
    assert message in " ".join(capsys.readouterr().err.split())

"""`--deterministic`: the environment variables that it sets, and the error if they are missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.training_runs import RECIPE, recipe, run_in, write_text

from bridge.storage import manifest
from gpt2_jax.cli import run_training
from gpt2_jax.cli.parsing import parse_and_run
from gpt2_jax.cli.verbs import train as verb
from gpt2_jax.training import TrainingError
from gpt2_jax.training.determinism import is_deterministic, make_deterministic

SHORT = "--tokenizer bytes --max-steps 2 --eval-batches 1 --sample-tokens 0 --batch-size 2 --seq-len 8"
TINY = "--n-layer 1 --n-embd 8 --n-head 1"


def test_existing_flags_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false --other=1")
    monkeypatch.setenv("NPROC", "8")
    assert not is_deterministic(os.environ)
    make_deterministic()
    make_deterministic()
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=false --other=1 --xla_gpu_deterministic_ops=true"
    assert os.environ["NPROC"] == "1"
    assert is_deterministic(os.environ)


def test_the_last_flag_of_a_name_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=false")
    monkeypatch.setenv("NPROC", "1")
    assert not is_deterministic(os.environ)
    make_deterministic()
    assert is_deterministic(os.environ)


def test_a_flags_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "/etc/xla.flags")
    with pytest.raises(TrainingError, match=r"XLA_FLAGS is the file '/etc/xla\.flags'"):
        make_deterministic()
    assert os.environ["XLA_FLAGS"] == "/etc/xla.flags"


def test_the_library_requires_the_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NPROC", raising=False)
    with pytest.raises(
        TrainingError, match=r"^deterministic: .*XLA_FLAGS=--xla_gpu_deterministic_ops=true and NPROC=1"
    ):
        run_in(tmp_path, recipe(deterministic=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stored", "flags", "wanted"),
    [
        (False, [], False),
        (False, ["--deterministic"], True),
        (False, ["--deterministic", "--no-deterministic"], False),
        (False, ["--no_deterministic", "--deterministic"], True),
        (True, [], True),
        (True, ["--no-deterministic"], False),
    ],
)
def test_the_command_sets_up_its_process_before_it_trains(
    stored: bool, flags: list[str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default of the flag comes from the preset or the resumed run."""
    calls: list[str] = []

    def train_and_report(*_: Any, **__: Any) -> int:
        calls.append("train")
        return 0

    monkeypatch.setattr(verb, "restart_with_huge_pages", lambda: calls.append("huge pages"))
    monkeypatch.setattr(verb, "make_deterministic", lambda: calls.append("deterministic"))
    monkeypatch.setattr(verb, "enable_compilation_cache", lambda: calls.append("cache"))
    monkeypatch.setattr(run_training, "train_and_report", train_and_report)
    command = verb.train_command(recipe(deterministic=stored), own_process=True)
    assert parse_and_run(command, "train", ["--out", "x", *flags]) == 0
    assert calls == ["huge pages", *(["deterministic"] if wanted else []), "cache", "train"]
    assert RECIPE.deterministic is False


@pytest.mark.processes
def test_the_command_runs_on_one_thread_and_records_that_in_the_manifest(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from gpt2_jax.cli import main
try:
    main()
finally:
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    print("threads of XLA:", sum(name.startswith("tf_XLAEigen") for name in threads))
"""
    places = [
        "--data",
        write_text(tmp_path),
        "--tokenizer",
        "bytes",
        "--cache",
        tmp_path / "c",
        "--out",
        tmp_path / "run",
    ]
    command = [sys.executable, "-c", code, "train", *map(str, places), *SHORT.split(), *TINY.split(), "--deterministic"]
    # Skip the restart for huge pages, which would replace this process and does not change results.
    environment = {**os.environ, "GPT2_BRIDGE_RESTARTED": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "threads of XLA: 1" in done.stdout
    flags = manifest.verify(tmp_path / "run" / "export")["flags"]
    assert is_deterministic(flags)

"""Damaged and malicious run.json files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import run
from support.refusals import within_budget

from gpt2_jax.training import TrainConfig, TrainingError
from gpt2_jax.training.config import flat
from gpt2_jax.training.run.identity import VERSION, Identity, stored_identity

CONFIG = flat(TrainConfig())
STORED: dict[str, Any] = {"version": VERSION, "config": CONFIG, "data": "0" * 64, "tokenizer": None}


def changed(**changes: Any) -> bytes:
    return json.dumps({**STORED, **changes}).encode()


def with_config(**changes: Any) -> bytes:
    return changed(config={**CONFIG, **changes})


DAMAGE: dict[str, bytes] = {
    "empty": b"",
    "truncated": changed()[:100],
    "list": b"[1]",
    "deep": b"[" * 200_000,
    "not UTF-8": b"\xff" + changed(),
    "a name twice": b'{"version": 2, "version": 2}',
    "5,000 digits": changed().replace(b'"version": 2', b'"version": 2' + b"0" * 5000),
    "30 MB": b"[" + b"1," * 15_000_000 + b"1]",
    "no fields": b"{}",
    **{f"version {str(value)[:9]}": changed(version=value) for value in (0, 3, "2", True, 2.0, None, 10**400, [2])},
    **{f"data {str(value)[:9]}": changed(data=value) for value in (3, True, None, [], {})},
    **{f"tokenizer {str(value)[:9]}": changed(tokenizer=value) for value in (3, True, [], {})},
    **{f"config {value!r}": changed(config=value) for value in ([], "x", None, 3, {})},
    "config field unknown": with_config(**{"\x1b[31mmomentum": 1}),
    "config field missing": changed(config={name: value for name, value in CONFIG.items() if name != "max_steps"}),
    "steps of 400 digits": with_config(max_steps=10**400),
    "steps 2^70": with_config(max_steps=2**70),
    "steps text": with_config(max_steps="many"),
    "steps true": with_config(max_steps=True),
    "steps null": with_config(max_steps=None),
    "learning rate of 400 digits": with_config(learning_rate=10**400),
    "learning rate NaN": with_config(learning_rate=float("nan")),
    "learning rate infinite": with_config(learning_rate=float("inf")),
    "n_layer of 400 digits": with_config(n_layer=10**400),
    "n_embd text": with_config(n_embd="768"),
    "optimizer unknown": with_config(optimizer="\x1b[31msgd"),
    "mesh with an escape code": with_config(mesh="\x1b[31m"),
    "data with NUL": with_config(data="a\0b"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_json_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    (tmp_path / "run.json").write_bytes(DAMAGE[damage])
    with within_budget(), pytest.raises(TrainingError, match=r"run\.json") as error:
        stored_identity(tmp_path)
    message = str(error.value)
    assert message.replace("\n", "").isprintable() and len(message) < 4000


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_special_files_are_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "run.json")
    with within_budget(), pytest.raises(TrainingError, match=r"run\.json"):
        stored_identity(tmp_path)


def test_run_json_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(changed(tokenizer="1" * 64, versions={"jax": "1"}))
    assert stored_identity(tmp_path) == Identity(TrainConfig(), "0" * 64, "1" * 64)


def test_resuming_with_a_damaged_run_json_ends_with_its_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_bytes(DAMAGE["steps of 400 digits"])
    assert run("train", "--resume", "--out", tmp_path) == 2
    printed = capsys.readouterr().err
    assert "max_steps=1000" in printed and "run.json" in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    "flag", ["--max-steps", "--seed", "--learning-rate", "--batch-size", "--n-layer", "--max-grad-norm"]
)
def test_a_flag_of_400_digits_is_refused(tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--out", tmp_path / "run", flag, "1" + "0" * 400) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err + printed.out
    assert not (tmp_path / "run").exists()

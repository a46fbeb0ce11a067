"""A run of version 0.1.0, whose run.json has version 1, is read, resumed and exported again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import run as gpt2
from support.training_runs import all_weights, files, records

import bridge
from bridge.formats.trainers.run import steps
from gpt2_jax.training import TrainingError
from gpt2_jax.training.config import flat, validation_sets
from gpt2_jax.training.run.identity import VERSION, stored_identity

FILES = Path(__file__).parents[1] / "files"
OLD, TEXT = FILES / "run-0.1.0", FILES / "run-0.1.0.txt"

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, in the directory that its --data text.txt is relative to."""
    shutil.copytree(OLD, tmp_path / "run")
    shutil.copy(TEXT, tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def resume(*flags: object) -> int:
    return gpt2("train", "--out", "run", "--resume", "--cache", "cache", *flags)


def test_its_configuration_has_the_new_names(old: Path) -> None:
    written = json.loads((old / "run.json").read_text())
    config = flat(stored_identity(old).config)
    assert written["version"] == 1 and written["config"]["accumulate"] == 2
    assert config["max_steps"] == written["config"]["steps"] == 6
    assert config["seq_len"] == written["config"]["length"] == 32
    assert config["num_microbatches"] == written["config"]["accumulate"] == 2
    assert config["max_grad_norm"] == written["config"]["clip_norm"] == 0.5
    same = config.keys() & written["config"].keys()
    # 4 were renamed; 3, those for records, those for adapters and 3 for other methods of fine-tuning were added
    assert len(same) == len(config) - 4 - 3 - 5 - 5 - 3
    assert written["config"]["validation_data"] is None
    expected = {name: written["config"][name] for name in same} | {"validation_data": ()}
    assert {name: config[name] for name in same} == expected


@pytest.mark.parametrize(
    ("stored", "sets"),
    [
        (None, ()),
        ("val.txt", ("val.txt",)),
        ("lr=3/val.txt", ("./lr=3/val.txt",)),
        ("/lr=3/val.txt", ("/lr=3/val.txt",)),
        (["a=b"], ("a=b",)),
    ],
)
def test_one_validation_set_becomes_a_list(old: Path, stored: Any, sets: tuple[str, ...]) -> None:
    change_config(old, validation_data=stored)
    config = stored_identity(old).config
    assert config.validation_data == sets
    if isinstance(stored, str):
        assert [*validation_sets(config.validation_data)] == [""]


@pytest.mark.parametrize(("before", "now"), [("plain", "xla"), ("blocks", "blockwise"), ("auto", "auto")])
def test_its_attention_has_the_new_name(old: Path, before: str, now: str) -> None:
    change_config(old, attention=before)
    assert stored_identity(old).config.attention == now


def test_a_field_that_version_1_did_not_always_store_has_its_default(old: Path) -> None:
    stored = json.loads((old / "run.json").read_text())
    del stored["config"]["source_activation"]
    (old / "run.json").write_text(json.dumps(stored))
    assert stored_identity(old).config.source_activation is None


def test_a_field_that_version_2_did_not_always_store_has_its_default(old: Path) -> None:
    config = flat(stored_identity(old).config)
    del config["drop_extra_heads"], config["base"]
    stored = json.loads((old / "run.json").read_text())
    (old / "run.json").write_text(json.dumps({**stored, "version": 2, "config": config}))
    assert stored_identity(old).config.drop_extra_heads is False


def test_new_names_are_unknown_in_version_1(old: Path) -> None:
    change_config(old, max_steps=6)
    with pytest.raises(TrainingError, match=r"run\.json': version 1 has no field 'max_steps'"):
        stored_identity(old)


def test_old_names_are_unknown_in_version_2(old: Path) -> None:
    stored = json.loads((old / "run.json").read_text())
    (old / "run.json").write_text(json.dumps({**stored, "version": 2}))
    with pytest.raises(TrainingError, match=r"(?s)'max_steps' is missing.*'clip_norm' is unknown"):
        stored_identity(old)


def test_a_later_version_is_refused(old: Path) -> None:
    stored = json.loads((old / "run.json").read_text())
    (old / "run.json").write_text(json.dumps({**stored, "version": VERSION + 1}))
    with pytest.raises(TrainingError, match=r"has version 3, but this gpt2-bridge reads versions up to 2; install"):
        stored_identity(old)


def test_its_weights_are_read_and_are_those_of_its_export(old: Path) -> None:
    checkpoint = bridge.load(old)
    assert checkpoint.format == "run" and checkpoint.diagnostics == ("read from checkpoints/6",)
    exported = all_weights(old / "export")
    read = dict(checkpoint.tensors.items())
    assert read.keys() == exported.keys()
    assert all(np.array_equal(exported[name], array) for name, array in read.items())


def test_it_can_be_resumed_and_exported_again(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, first_records, export = files(old), records(old), all_weights(old / "export")
    assert resume("--max-steps", 9) == 2
    assert "max_steps was '6', now '9'" in capsys.readouterr().err
    assert files(old) == before

    assert resume("--max-steps", 9, "--accept-changes") == 0
    stored = json.loads((old / "run.json").read_text())
    assert (stored["version"], stored["config"]["max_steps"]) == (2, 9) and "steps" not in stored["config"]
    assert 9 in steps(old)
    found = records(old)
    assert found[: len(first_records)] == first_records and [r["step"] for r in found] == list(range(10))
    again = all_weights(old / "export")
    assert again.keys() == export.keys()
    assert any(not np.array_equal(again[name], array) for name, array in export.items())


def test_a_resume_of_a_finished_run_does_not_change_its_weights(old: Path) -> None:
    weights = all_weights(old)
    assert resume() == 0
    assert json.loads((old / "run.json").read_text())["version"] == 2
    assert all(np.array_equal(weights[name], array) for name, array in all_weights(old).items())
    assert all(np.array_equal(weights[name], array) for name, array in all_weights(old / "export").items())


def change_config(run: Path, **changes: Any) -> None:
    stored = json.loads((run / "run.json").read_text())
    stored["config"].update(changes)
    (run / "run.json").write_text(json.dumps(stored))

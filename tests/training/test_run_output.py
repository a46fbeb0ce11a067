"""The files, log and checkpoints of a finished run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.training_runs import RECIPE, all_weights

import bridge
from bridge.formats.trainers.run import steps, validation_loss
from gpt2_jax.training import Outcome
from gpt2_jax.training.run.metrics import read_metrics


def test_the_files_of_a_finished_run(finished: Outcome) -> None:
    assert (finished.step, finished.stopped_by) == (6, None)
    assert {p.name for p in finished.run.iterdir()} >= {
        "run.json",
        "config.json",
        "metrics.jsonl",
        "loss.png",
        "export",
    }
    assert finished.plot.read_bytes().startswith(b"\x89PNG")
    assert (
        finished.best_val_loss
        == validation_loss(finished.run, finished.best_step)
        == read_metrics(finished.run)[-1]["val_loss"]
    )
    assert json.loads(json.dumps(finished.to_json()))["export"] == str(finished.export)
    assert bridge.load(finished.run).config == RECIPE.model
    assert all(np.isfinite(array).all() for array in all_weights(finished.run).values())


def test_the_records_of_the_log(finished: Outcome) -> None:
    """Every log_every=2 and eval_every=4 steps, before the first and after the last step."""
    kept = read_metrics(finished.run)
    assert [record["step"] for record in kept] == [0, 2, 4, 6]
    assert [record["step"] for record in kept if "val_loss" in record] == [0, 4, 6]
    logged = {"step", "train_loss", "grad_norm", "learning_rate"}
    assert set(kept[1]) == logged  # no speed yet: the first steps compile
    assert set(kept[3]) == logged | {"val_loss", "tokens_per_second", "mfu"}
    assert kept[1]["learning_rate"] == pytest.approx(
        1e-2 * 2 / 3
    )  # the learning rate of the second step, which has number 1
    assert kept[3]["train_loss"] < kept[1]["train_loss"]
    assert kept[3]["val_loss"] < kept[0]["val_loss"]


def test_the_last_and_the_best_checkpoints_are_kept(finished: Outcome) -> None:
    assert steps(finished.run) == [4, 6]  # 3, 4 and 6 were written; keep_last=2

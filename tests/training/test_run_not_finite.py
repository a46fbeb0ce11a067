"""A non-finite loss ends a run at its step, or the step is skipped and counted; saved states are finite."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from support.models import random_checkpoint
from support.training_runs import RECIPE, all_weights, data_for, recipe, run_in, stop_at

import bridge
from bridge.formats.trainers.run import steps
from gpt2_jax.training import NonFiniteLoss, learning_rate_schedule, loop, resolve_config, train
from gpt2_jax.training.run import report
from gpt2_jax.training.run.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")


def poison(monkeypatch: pytest.MonkeyPatch, step: int, *, before: bool, ema: bool = False) -> None:
    """Make one weight NaN before the update of `step`, or after it, when loss and gradient are still finite."""
    make = loop.make_train_step

    def spoiled(state: Any) -> Any:
        field = "ema_params" if ema else "params"
        tree = getattr(state, field)
        tree["wpe"]["embedding"] = tree["wpe"]["embedding"].at[0, 0].set(np.nan)
        return state._replace(**{field: tree})

    def make_poisoned(*args: Any, **options: Any) -> Callable[..., Any]:
        inner = make(*args, **options)

        def poisoned(state: Any, batch: Any) -> Any:
            now = int(state.step) + 1 == step
            state, metrics = inner(spoiled(state) if now and before else state, batch)
            return spoiled(state) if now and not before else state, metrics

        poisoned.lower = inner.lower  # type: ignore[attr-defined]
        return poisoned

    monkeypatch.setattr(loop, "make_train_step", make_poisoned)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("field", "message"), [("opt_state", "the optimizer's state"), ("ema_params", "the moving average of the weights")]
)
@pytest.mark.parametrize("non_finite", ["stop", "skip"])
def test_a_non_finite_state_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, message: str, non_finite: str
) -> None:
    def spoiled(state: Any) -> Any:
        leaves, tree = jax.tree.flatten(getattr(state, field))
        last = max(range(len(leaves)), key=lambda i: leaves[i].ndim)  # not a count
        leaves[last] = leaves[last].at[0].set(np.inf)
        return state._replace(**{field: jax.tree.unflatten(tree, leaves)})

    monkeypatch.setattr(loop.Loop, "validate", lambda self: 1.0)
    save = loop.Loop.save

    def save_spoiled(self: loop.Loop) -> None:
        self.state = spoiled(self.state)
        save(self)

    monkeypatch.setattr(loop.Loop, "save", save_spoiled)
    with pytest.raises(NonFiniteLoss, match=f"^step 3: the update made {message} NaN or infinite"):
        run_in(tmp_path, recipe(ema_decay=0.9, non_finite=non_finite))
    assert steps(tmp_path / "run") == []


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("at", "before", "message", "kept"),
    [
        (5, True, "^step 5: loss nan", [3, 4]),  # found when step 6 is logged
        (4, True, "^step 4: loss nan", [3]),
        (3, False, "^step 3: the update made weights", []),
        (4, False, "^step 4: validation loss nan", [3]),
    ],
)
def test_a_non_finite_loss_stops_the_run_at_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, before: bool, message: str, kept: list[int]
) -> None:
    poison(monkeypatch, at, before=before)
    with pytest.raises(NonFiniteLoss, match=message):
        run_in(tmp_path, RECIPE)
    assert steps(tmp_path / "run") == kept
    for step in kept:
        weights = all_weights(tmp_path / "run" / "checkpoints" / str(step))
        assert all(np.isfinite(array).all() for array in weights.values())
    assert all(np.isfinite(value) for record in read_metrics(tmp_path / "run") for value in record.values())
    if kept == [3, 4]:  # the kept checkpoints can be resumed
        monkeypatch.undo()
        assert run_in(tmp_path, RECIPE, resume=True).step == 6


def test_a_learning_rate_that_is_far_too_high_is_found(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match=r"^step 2: loss"):
        run_in(tmp_path, recipe(learning_rate=1e30))
    assert steps(tmp_path / "run") == []


def test_a_checkpoint_with_nan_is_found_before_the_first_step(tmp_path: Path) -> None:
    good = random_checkpoint(RECIPE.model)
    weights = dict(good.tensors.items())
    weights["ln_f.weight"] = np.full_like(weights["ln_f.weight"], np.nan)
    with pytest.raises(NonFiniteLoss, match=r"^step 0: validation loss nan"):
        run_in(tmp_path, recipe(init_from="memory"), init_from=bridge.Checkpoint.of(weights, good.config))
    assert steps(tmp_path / "run") == []


def bad_batches(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Give these steps an invalid token, which makes their loss NaN."""
    inner = loop.training_batches

    def batches(*args: Any, start_step: int, **options: Any) -> Iterator[Any]:
        for step, batch in enumerate(inner(*args, start_step=start_step, **options), start=start_step + 1):
            ids = np.full_like(batch["input_ids"], 9999) if step in steps else batch["input_ids"]
            yield {**batch, "input_ids": ids}

    monkeypatch.setattr(loop, "training_batches", batches)


def test_non_finite_steps_are_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over a resume. The result equals that of a run without the skipped batches."""
    bad_batches(monkeypatch, 2, 4)
    changes = recipe(non_finite="skip", log_every=1, max_steps=6)
    with monkeypatch.context() as stopping:
        stop_at(stopping, 3, lambda: signal.raise_signal(signal.SIGTERM))
        run_in(tmp_path, changes)
    said = io.StringIO()
    data = data_for(changes, tmp_path)
    outcome = train(
        resolve_config(changes, data), tmp_path / "run", data, resume=True, console=Console(file=said, width=1000)
    )
    assert outcome.step == 6
    assert "step 4: loss nan, gradient norm nan; skipped, 2 in total" in said.getvalue()
    records = {record["step"]: record for record in read_metrics(outcome.run)}
    assert [records[step]["skipped"] for step in range(1, 7)] == [0, 1, 1, 2, 2, 2]
    assert [step for step in range(1, 7) if "train_loss" not in records[step]] == [2, 4]
    assert all(np.isfinite(value) for record in records.values() for value in record.values())
    schedule = learning_rate_schedule(changes.optimizer, 6)
    assert [records[step]["learning_rate"] for step in (1, 3, 5, 6)] == [float(schedule(n)) for n in range(4)]


def test_a_stopped_run_can_be_resumed_with_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad_batches(monkeypatch, 4)
    with pytest.raises(NonFiniteLoss, match=r"^step 4: loss nan"):
        run_in(tmp_path, RECIPE)
    assert run_in(tmp_path, recipe(non_finite="skip"), resume=True).step == 6


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_SKIPPED_IN_A_ROW", 3)
    bad_batches(monkeypatch, 1, 3, 4, 5, 6)
    with pytest.raises(NonFiniteLoss, match=r"^step 5: loss nan.*3 consecutive steps were skipped"):
        run_in(tmp_path, recipe(non_finite="skip", max_steps=9))

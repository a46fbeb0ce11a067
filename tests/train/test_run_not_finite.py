"""A loss that is not finite ends a run, at its step, and what is kept is finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import random_checkpoint
from training_runs import RECIPE, all_weights, recipe, run_in

import bridge
from bridge.formats.run import steps
from gpt2_jax.train import NonFiniteLoss, loop
from gpt2_jax.train.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")


def poison(monkeypatch: pytest.MonkeyPatch, step: int, *, before: bool, ema: bool = False) -> None:
    """Make one weight NaN before the update of `step`, or after it, when loss and gradient were still finite."""
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

        return poisoned

    monkeypatch.setattr(loop, "make_train_step", make_poisoned)


@pytest.mark.parametrize(
    ("at", "before", "message", "kept"),
    [
        (5, True, "^step 5: loss nan", [3, 4]),  # found when step 6 is logged
        (4, True, "^step 4: loss nan", [3]),
        (3, False, "^step 3: its update made weights", []),
        (4, False, "^step 4: validation loss nan", [3]),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(
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
    if kept == [3, 4]:  # what is kept can be gone on from
        monkeypatch.undo()
        assert run_in(tmp_path, RECIPE, resume=True).step == 6


def test_a_learning_rate_that_is_far_too_high_is_found(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match=r"^step 2: loss"):
        run_in(tmp_path, recipe(learning_rate=1e30))
    assert steps(tmp_path / "run") == []


def test_a_checkpoint_that_is_nan_already_is_found_before_the_first_step(tmp_path: Path) -> None:
    good = random_checkpoint(RECIPE.model)
    weights = dict(good.tensors.items())
    weights["ln_f.weight"] = np.full_like(weights["ln_f.weight"], np.nan)
    with pytest.raises(NonFiniteLoss, match=r"^step 0: validation loss nan"):
        run_in(tmp_path, recipe(init_from="memory"), init_from=bridge.Checkpoint.of(weights, good.config))
    assert steps(tmp_path / "run") == []

"""The validation loss: its weights and its batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support.training_runs import RECIPE, data_for, recipe

from gpt2_jax.parallel.sharding import make_mesh
from gpt2_jax.training import TrainingError, loop


def test_the_moving_average_is_evaluated(tmp_path: Path) -> None:
    state = loop.TrainState(jax.numpy.int32(1), "weights", None, "their mean")
    seen = []

    def eval_step(params: Any, batch: Any, frozen: Any) -> tuple[float, int]:
        seen.append(params)
        return 1.0, 2

    data, mesh = data_for(RECIPE, tmp_path), make_mesh()
    assert loop.validation_loss(eval_step, RECIPE, data, state, mesh) == 0.5
    assert loop.validation_loss(eval_step, RECIPE, data, state._replace(ema_params=None), mesh) == 0.5
    assert set(seen) == {"their mean", "weights"}


def test_validation_data_without_a_label_is_an_error(tmp_path: Path) -> None:
    state = loop.TrainState(jax.numpy.int32(0), {}, {})
    with pytest.raises(TrainingError, match="nothing to predict"):
        loop.validation_loss(
            lambda params, batch, frozen: (0.0, 0), RECIPE, data_for(RECIPE, tmp_path), state, make_mesh()
        )


def test_an_evaluation_batch_has_the_rows_of_a_microbatch(tmp_path: Path) -> None:
    """A batch that is trained in 40 microbatches does not fit on a device at once. The windows stay the same."""
    seen = []

    def eval_step(params: Any, batch: Any, frozen: Any) -> tuple[float, int]:
        seen.append(batch["input_ids"])
        return 1.0, 1

    data, state = data_for(RECIPE, tmp_path), loop.TrainState(jax.numpy.int32(0), {}, {})
    for num_microbatches in (1, 2):
        loop.validation_loss(eval_step, recipe(num_microbatches=num_microbatches), data, state, make_mesh())
    assert [len(ids) for ids in seen] == [4, 4, 2, 2, 2, 2]
    np.testing.assert_array_equal(np.concatenate(seen[:2]), np.concatenate(seen[2:]))

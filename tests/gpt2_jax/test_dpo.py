"""Direct preference optimization: the log-probabilities and the loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import TINY, random_ids, random_state

import bridge
from bridge import IGNORE_INDEX
from gpt2_jax import GPT2, dpo_loss, sequence_log_probs, summed_loss

PAIRS = {
    "policy_chosen": [-10.0, -25.0, -3.5],
    "policy_rejected": [-12.0, -20.0, -3.5],
    "reference_chosen": [-11.0, -24.0, -3.0],
    "reference_rejected": [-11.5, -22.0, -4.0],
}
"""Log-ratios: +1 and -0.5; -1 and +2; -0.5 and +0.5."""
MARGINS = np.array([1.5, -3.0, -1.0])


def pairs() -> dict[str, Any]:
    return {name: jnp.array(values) for name, values in PAIRS.items()}


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_that_of_the_formula(beta: float, smoothing: float) -> None:
    found = dpo_loss(**pairs(), beta=beta, label_smoothing=smoothing)
    wins = 1 / (1 + np.exp(-beta * MARGINS))
    expected = -(1 - smoothing) * np.log(wins) - smoothing * np.log(1 - wins)
    np.testing.assert_allclose(found.losses, expected, rtol=1e-6)
    np.testing.assert_allclose(found.chosen_rewards, beta * np.array([1.0, -1.0, -0.5]), rtol=1e-6)
    np.testing.assert_allclose(found.rejected_rewards, beta * np.array([-0.5, 2.0, 0.5]), rtol=1e-6)


def test_the_gradient_raises_the_chosen_answer_and_lowers_the_rejected_one() -> None:
    """Equation 7's gradient: each pair is weighted by beta times the probability of the wrong preference."""
    beta = 0.5

    def total(chosen: Any, rejected: Any) -> Any:
        return dpo_loss(**{**pairs(), "policy_chosen": chosen, "policy_rejected": rejected}, beta=beta).losses.sum()

    chosen, rejected = jax.grad(total, (0, 1))(pairs()["policy_chosen"], pairs()["policy_rejected"])
    weights = beta / (1 + np.exp(beta * MARGINS))
    np.testing.assert_allclose(chosen, -weights, rtol=1e-6)
    np.testing.assert_allclose(rejected, weights, rtol=1e-6)


def test_large_margins_stay_finite() -> None:
    zeros, large = jnp.zeros(2), jnp.array([1e4, -1e4])
    np.testing.assert_allclose(dpo_loss(large, zeros, zeros, zeros, beta=1.0).losses, [0.0, 1e4])


def test_the_log_probability_of_an_answer_is_that_of_its_labels_alone() -> None:
    config = replace(TINY, n_layer=1)
    model, params = GPT2(config), bridge.to_flax(random_state(config), config)
    ids = random_ids(config, length=9).astype(np.int32)
    labels = np.roll(ids, -1, axis=1)
    labels[:, :4] = labels[:, -1] = IGNORE_INDEX
    found = jax.jit(lambda batch: sequence_log_probs(model, params, batch))({"input_ids": ids, "labels": labels})
    logits = jax.jit(model.apply)({"params": params}, ids)
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
    expected = [sum(log_probs[row, t, ids[row, t + 1]] for t in range(4, 8)) for row in range(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_packed_answers_count_as_in_the_loss() -> None:
    config = replace(TINY, n_layer=1)
    model, params = GPT2(config), bridge.to_flax(random_state(config), config)
    ids = random_ids(config, length=9).astype(np.int32)
    batch = {"input_ids": ids, "labels": np.roll(ids, -1, axis=1), "segment_ids": np.array([[1] * 5 + [2] * 4] * 2)}
    found = jax.jit(lambda batch: sequence_log_probs(model, params, batch).sum())(batch)
    np.testing.assert_allclose(-found, jax.jit(lambda batch: summed_loss(model, params, batch))(batch), rtol=1e-5)

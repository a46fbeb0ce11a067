"""Cross-entropy per token: both backends against the definition, and ignored labels."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import gpt2_jax.ops.cross_entropy
import gpt2_torch.ops.cross_entropy
from bridge import IGNORE_INDEX
from gpt2_torch.arrays import tensor_from_array

B, T, V = 3, 7, 29

FP64 = 1e-13
"""Nats; about a hundred units of float64 rounding of a loss near 10."""

FP32 = 1e-5
"""Nats; ten units of float32 rounding of a loss near 10."""

DTYPES = [(np.float64, FP64), (np.float32, FP32), (ml_dtypes.bfloat16, FP32)]

Losses = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(logits, labels) -> per-token losses, and the gradient of their sum by the logits."""


def torch_losses(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tensor = tensor_from_array(logits).requires_grad_()
    losses = gpt2_torch.ops.cross_entropy.cross_entropy(tensor, torch.from_numpy(labels))
    losses.sum().backward()
    return losses.detach().numpy(), tensor.grad.double().numpy()


def jax_losses(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    def total(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = gpt2_jax.ops.cross_entropy.cross_entropy(logits, jnp.asarray(labels))
        return losses.sum(), losses

    (_, losses), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(jnp.asarray(logits))
    return np.asarray(losses), np.asarray(gradient).astype(np.float64)


@pytest.fixture(params=[torch_losses, jax_losses], ids=["torch", "jax"])
def losses_of(request: pytest.FixtureRequest) -> Losses:
    return request.param


def logits_and_labels(dtype: type = np.float64) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(scale=4.0, size=(B, T, V)).astype(dtype), rng.integers(0, V, (B, T), dtype=np.int32)


def expected(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute losses and gradients from the definition, in float64."""
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=-1, keepdims=True)
    counted = labels != IGNORE_INDEX
    one_hot = np.eye(V)[np.where(counted, labels, 0)]
    return np.where(counted, -np.log((p * one_hot).sum(-1)), 0), (p - one_hot) * counted[..., None]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=["float64", "float32", "bfloat16"])
def test_losses_are_those_of_the_definition_and_at_least_float32(
    losses_of: Losses, dtype: type, tolerance: float, x64: None
) -> None:
    logits, labels = logits_and_labels(dtype)
    losses, gradient = losses_of(logits, labels)
    assert losses.dtype == (np.float64 if dtype is np.float64 else np.float32)
    expected_losses, expected_gradient = expected(logits, labels)
    np.testing.assert_allclose(losses, expected_losses, atol=tolerance, rtol=0)
    narrowed = 2.0**-8 if dtype is ml_dtypes.bfloat16 else tolerance  # a gradient has the dtype of its logits
    np.testing.assert_allclose(gradient, expected_gradient, atol=narrowed, rtol=0)


def test_ignored_labels_have_no_loss_and_no_gradient(losses_of: Losses, x64: None) -> None:
    logits, labels = logits_and_labels()
    everywhere, _ = losses_of(logits, labels)
    ignored = np.zeros((B, T), bool)
    ignored[0, 0] = ignored[0, 3:5] = ignored[2, -1] = ignored[1] = True  # including a whole row
    labels[ignored] = IGNORE_INDEX
    losses, gradient = losses_of(logits, labels)
    assert (losses[ignored] == 0).all() and (gradient[ignored] == 0).all()
    np.testing.assert_array_equal(losses[~ignored], everywhere[~ignored])
    np.testing.assert_allclose(gradient, expected(logits, labels)[1], atol=FP64, rtol=0)


def test_all_labels_ignored_gives_zero_loss_and_gradient(losses_of: Losses) -> None:
    logits, labels = logits_and_labels(np.float32)
    losses, gradient = losses_of(logits, np.full_like(labels, IGNORE_INDEX))
    assert (losses == 0).all() and (gradient == 0).all()


def test_large_logits_do_not_overflow(losses_of: Losses) -> None:
    logits, labels = logits_and_labels(np.float32)
    losses, gradient = losses_of(logits * 1e4, labels)
    assert np.isfinite(losses).all() and np.isfinite(gradient).all()


@pytest.mark.parametrize("label", [-1, -V, -99, V, V + 100])
def test_a_label_outside_the_vocabulary_is_detected(label: int) -> None:
    logits, labels = logits_and_labels(np.float32)
    labels[1, 2] = label
    with pytest.raises(IndexError):
        torch_losses(logits, labels)
    losses, _ = jax_losses(logits, labels)
    assert np.isnan(losses[1, 2]) and np.isnan(losses).sum() == 1


def test_the_ignored_label_is_that_of_pytorch() -> None:
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORE_INDEX


def ranks_of(module: str, logits: np.ndarray, labels: np.ndarray) -> list[int]:
    if module == "torch":
        return gpt2_torch.ops.cross_entropy.label_ranks(torch.from_numpy(logits), torch.from_numpy(labels))[0].tolist()
    return gpt2_jax.ops.cross_entropy.label_ranks(jnp.asarray(logits), jnp.asarray(labels))[0].tolist()


@pytest.mark.parametrize("module", ["torch", "jax"])
def test_the_most_likely_label_has_rank_1_and_ties_are_ordered_by_id(module: str) -> None:
    logits = np.tile(np.array([1.0, 3.0, 2.0, 3.0, -np.inf], np.float32), (1, 6, 1))
    labels = np.array([[0, 1, 2, 3, 4, IGNORE_INDEX]])
    assert ranks_of(module, logits, labels) == [4, 1, 3, 2, 5, 0]

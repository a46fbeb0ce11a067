"""Rows of different lengths in one batch: padding affects only its own positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.implementations import jax_logits, jax_model, relative_l2, torch_logits, torch_model, transformers_model
from support.models import TINY, random_checkpoint, random_ids

import bridge
from bridge import Checkpoint

FP64_ABSOLUTE = 1e-12  # logits of order 1; sums have another order in a batch than in a single row
FP64_GRADIENT = 1e-10  # relative L2 of one parameter's gradient

LENGTHS = (5, 13, 9)
CONFIG = replace(TINY, n_layer=2, scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False)

Logits = Callable[..., np.ndarray]
BACKENDS: dict[str, Logits] = {
    "gpt2_torch": torch_logits,
    "gpt2_jax": lambda *args: jax_logits(*args, jit=True),
    "gpt2_jax scanned": lambda *args: jax_logits(*args, jit=True, scan=True),
}
each_backend = pytest.mark.parametrize("logits", BACKENDS.values(), ids=BACKENDS)
each_side = pytest.mark.parametrize("side", ["left", "right"])


@pytest.fixture
def checkpoint(x64: None) -> Checkpoint:
    return random_checkpoint(CONFIG, np.float64)


def padded_batch(side: str) -> tuple[np.ndarray, np.ndarray]:
    """Return random ids, also at padding, and the mask of the tokens."""
    ids = random_ids(CONFIG, len(LENGTHS), max(LENGTHS))
    columns = np.arange(max(LENGTHS))
    lengths = np.array(LENGTHS)[:, None]
    mask = columns < lengths if side == "right" else columns >= max(LENGTHS) - lengths
    return ids, mask.astype(np.int64)


@pytest.mark.sampled(2)
@each_backend
@each_side
def test_each_row_equals_the_row_alone(side: str, logits: Logits, checkpoint: Checkpoint):
    ids, mask = padded_batch(side)
    together = logits(checkpoint, ids, mask)
    for row, row_mask, answer in zip(ids, mask.astype(bool), together, strict=True):
        alone = logits(checkpoint, row[None, row_mask])[0]
        assert np.abs(answer[row_mask] - alone).max() <= FP64_ABSOLUTE


@each_backend
@each_side
def test_rows_equal_transformers_with_explicit_positions(side: str, logits: Logits, checkpoint: Checkpoint):
    ids, mask = padded_batch(side)
    positions = (mask.cumsum(axis=1) - 1).clip(min=0)
    with torch.no_grad():
        peer = transformers_model(checkpoint)(
            torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), position_ids=torch.from_numpy(positions)
        ).logits.numpy()
    real = mask.astype(bool)
    assert np.abs(logits(checkpoint, ids, mask) - peer)[real].max() <= FP64_ABSOLUTE


@each_backend
@each_side
def test_padding_positions_are_finite(side: str, logits: Logits, checkpoint: Checkpoint):
    ids, mask = padded_batch(side)
    mask[1] = 0  # a row of padding only
    assert np.isfinite(logits(checkpoint, ids, mask)).all()


@each_backend
def test_a_mask_of_ones_equals_no_mask(logits: Logits, checkpoint: Checkpoint):
    ids = random_ids(CONFIG)
    assert np.abs(logits(checkpoint, ids, np.ones_like(ids)) - logits(checkpoint, ids)).max() <= FP64_ABSOLUTE


@pytest.mark.sampled(5)
@each_backend
@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.int32, np.uint8])
def test_the_mask_may_be_bool_or_any_integer(dtype: type, logits: Logits, checkpoint: Checkpoint):
    ids, mask = padded_batch("left")
    np.testing.assert_array_equal(logits(checkpoint, ids, mask.astype(dtype)), logits(checkpoint, ids, mask))


def loss_weights(mask: np.ndarray) -> np.ndarray:
    """Return 1 where a token and the next token are not padding."""
    return (mask[:, 1:] * mask[:, :-1]).astype(np.float64)


def torch_padded_gradients(checkpoint: Checkpoint, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    model = torch_model(checkpoint)
    logits = model(torch.from_numpy(ids), torch.from_numpy(mask))[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.mT, torch.from_numpy(ids)[:, 1:], reduction="none")
    (losses * torch.from_numpy(loss_weights(mask))).sum().backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters()}


def jax_padded_gradients(
    checkpoint: Checkpoint, ids: np.ndarray, mask: np.ndarray, *, scan: bool = False
) -> dict[str, np.ndarray]:
    model, params = jax_model(checkpoint, scan=scan)

    def loss(params: dict) -> jax.Array:
        log_probabilities = jax.nn.log_softmax(model.apply({"params": params}, ids, mask)[:, :-1])
        chosen = jnp.take_along_axis(log_probabilities, jnp.asarray(ids)[:, 1:, None], axis=-1)[..., 0]
        return -(chosen * loss_weights(mask)).sum()

    return bridge.to_torch(jax.jit(jax.grad(loss))(params), CONFIG)


@each_side
def test_gradients_with_padding_are_finite_and_equal_those_of_single_rows(side: str, checkpoint: Checkpoint):
    ids, mask = padded_batch(side)
    alone = [
        torch_padded_gradients(checkpoint, row[None, m], np.ones((1, m.sum()), int))
        for row, m in zip(ids, mask.astype(bool), strict=True)
    ]
    expected = {name: sum(gradients[name] for gradients in alone) for name in alone[0]}
    for answer in (
        torch_padded_gradients(checkpoint, ids, mask),
        jax_padded_gradients(checkpoint, ids, mask),
        jax_padded_gradients(checkpoint, ids, mask, scan=True),
    ):
        assert set(answer) == set(expected)
        for name, gradient in answer.items():
            assert np.isfinite(gradient).all(), name
            assert relative_l2(gradient, expected[name]) <= FP64_GRADIENT, name

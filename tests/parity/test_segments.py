"""Several documents in a row: with `segment_ids`, each gives what it gives alone, in both backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.implementations import jax_model, relative_l2, torch_model, transformers_model
from support.models import TINY, random_checkpoint, random_ids

import bridge
import gpt2_jax.model
import gpt2_torch.model
from bridge import IGNORE_INDEX, Checkpoint
from gpt2_jax import GPT2, summed_loss
from gpt2_jax.ops import blockwise_attention
from gpt2_torch.loss import summed_loss as torch_summed_loss

FP64_ABSOLUTE = 1e-12  # logits of order 1; sums have another order in a batch than in a single row
FP64_GRADIENT = 1e-10  # relative L2 of one parameter's gradient
FP32_GRADIENT = 1e-5  # the same in float32

CONFIG = replace(TINY, n_layer=2, scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False)
ROWS, LENGTH = 3, 31

Batch = dict[str, np.ndarray]
Answer = Callable[..., Any]

PACKINGS: Mapping[str, Callable[[np.random.Generator], np.ndarray]] = {
    "one after the other": lambda rng: np.sort(rng.integers(0, 6, LENGTH))[::-1],  # padding on the right
    "padding between": lambda rng: np.repeat(
        [1, 0, 2, 3, 0], np.diff(np.sort([0, *rng.integers(0, LENGTH, 4), LENGTH]))
    ),
    "interleaved": lambda rng: rng.integers(0, 4, LENGTH),
    "single tokens": lambda rng: rng.permutation(LENGTH) + 1,
    "one document": lambda rng: np.full(LENGTH, 7),
    "negative ids": lambda rng: np.sort(rng.integers(-5, 1, LENGTH)),
}
each_packing = pytest.mark.parametrize("packing", PACKINGS)
each_seed = pytest.mark.parametrize("seed", range(3))

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def checkpoint(x64: None) -> Checkpoint:
    return random_checkpoint(CONFIG, np.float64)


def packed(packing: str, seed: int = 0) -> Batch:
    """Return random ids, also at padding, their segments, and as labels the next token of the same segment."""
    rng = np.random.default_rng(seed)
    ids = random_ids(CONFIG, ROWS, LENGTH, seed).astype(np.int32)
    segments = np.stack([PACKINGS[packing](rng) for _ in range(ROWS)]).astype(np.int32)
    labels = np.full_like(ids, IGNORE_INDEX)
    for row, document in documents(segments):
        labels[row, document[:-1]] = ids[row, document[1:]]
    return {"input_ids": ids, "labels": labels, "segment_ids": segments}


def documents(segments: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Return the row and the places of the tokens of each document."""
    rows = [(row, np.flatnonzero(ids == i)) for row, ids in enumerate(segments) for i in np.unique(ids) if i != 0]
    assert rows
    return rows


def torch_logits(checkpoint: Checkpoint, ids: np.ndarray, **options: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        given = {name: torch.from_numpy(array) for name, array in options.items()}
        return torch_model(checkpoint)(torch.from_numpy(ids), **given).numpy()


@jax.jit(static_argnums=0)
def apply(model: GPT2, params: Any, ids: jax.Array, options: Mapping[str, jax.Array]) -> jax.Array:
    return model.apply({"params": params}, ids, **options)  # type: ignore[return-value]


@jax.jit(static_argnums=0)
def loss_gradients(model: GPT2, params: Any, batch: Mapping[str, jax.Array]) -> Any:
    return jax.grad(lambda params: summed_loss(model, params, batch))(params)


def jax_logits(
    checkpoint: Checkpoint, ids: np.ndarray, *, scan: bool = False, attention: Any = "auto", **options: np.ndarray
) -> np.ndarray:
    model, params = jax_model(checkpoint, scan=scan)
    return np.asarray(apply(model.clone(attention=attention), params, ids, options))


def torch_gradients(checkpoint: Checkpoint, batch: Batch) -> dict[str, np.ndarray]:
    model = torch_model(checkpoint)
    given = {name: torch.from_numpy(array).long() for name, array in batch.items()}
    torch_summed_loss(model, given).backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters()}


def jax_gradients(checkpoint: Checkpoint, batch: Batch, *, scan: bool = False, **options: Any) -> dict[str, np.ndarray]:
    model, params = jax_model(checkpoint, scan=scan)
    return bridge.to_torch(loss_gradients(model.clone(**options), params, batch), CONFIG)


LOGITS: dict[str, Answer] = {
    "torch": torch_logits,
    "jax xla": partial(jax_logits, attention="xla"),
    "jax blockwise": partial(jax_logits, attention="blockwise"),
    "jax scan": partial(jax_logits, scan=True),
}
GRADIENTS: dict[str, Answer] = {
    "torch": torch_gradients,
    "jax xla": partial(jax_gradients, attention="xla"),
    "jax blockwise": partial(jax_gradients, attention="blockwise"),
    "jax scan": partial(jax_gradients, scan=True),
    "jax scan xla": partial(jax_gradients, scan=True, attention="xla"),
    "jax dots": partial(jax_gradients, scan=True, remat="dots"),
    "jax full": partial(jax_gradients, remat="full"),
}
each_logits = pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)
each_gradients = pytest.mark.parametrize("gradients", GRADIENTS.values(), ids=GRADIENTS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of queries in a row, the last one partial."""
    monkeypatch.setattr(blockwise_attention, "BLOCK", 8)


@pytest.mark.sampled(3)
@each_logits
@each_packing
@each_seed
def test_each_document_equals_the_document_alone(
    seed: int, packing: str, logits: Answer, checkpoint: Checkpoint
) -> None:
    batch = packed(packing, seed)
    together = logits(checkpoint, batch["input_ids"], segment_ids=batch["segment_ids"])
    assert np.isfinite(together).all()
    alone = alone_by_torch(checkpoint, batch)
    for (row, document), expected in zip(documents(batch["segment_ids"]), alone, strict=True):
        assert np.abs(together[row, document] - expected).max() <= FP64_ABSOLUTE


def alone_by_torch(checkpoint: Checkpoint, batch: Batch) -> list[np.ndarray]:
    model, ids = torch_model(checkpoint), torch.from_numpy(batch["input_ids"])
    with torch.no_grad():
        return [model(ids[row, document][None])[0].numpy() for row, document in documents(batch["segment_ids"])]


@pytest.mark.sampled(3)
@each_gradients
@pytest.mark.parametrize("packing", ["one after the other", "interleaved"])
def test_gradients_equal_the_sum_over_the_documents_alone(
    packing: str, gradients: Answer, checkpoint: Checkpoint
) -> None:
    batch = packed(packing)
    alone = [
        torch_gradients(checkpoint, {name: batch[name][row, places][None] for name in ("input_ids", "labels")})
        for row, places in documents(batch["segment_ids"])
    ]
    found = gradients(checkpoint, batch)
    assert found.keys() == alone[0].keys()
    for name, gradient in found.items():
        assert relative_l2(gradient, sum(one[name] for one in alone)) <= FP64_GRADIENT, name


def test_blockwise_equals_xla_in_float32() -> None:
    checkpoint, batch = random_checkpoint(CONFIG), packed("one after the other")
    found, expected = (jax_gradients(checkpoint, batch, attention=name) for name in ("blockwise", "xla"))
    for name, gradient in found.items():
        assert gradient.dtype == np.float32
        assert relative_l2(gradient, expected[name]) <= FP32_GRADIENT, name


@each_logits
def test_one_segment_and_padding_are_an_attention_mask(logits: Answer, checkpoint: Checkpoint) -> None:
    ids = random_ids(CONFIG, ROWS, LENGTH)
    mask = (np.random.default_rng(0).random(ids.shape) < 0.7).astype(np.int64)
    masked = torch_logits(checkpoint, ids, attention_mask=mask)
    segments = logits(checkpoint, ids, segment_ids=mask)
    assert np.abs(masked - segments)[mask == 1].max() <= FP64_ABSOLUTE


@each_logits
def test_explicit_positions_equal_transformers(logits: Answer, checkpoint: Checkpoint) -> None:
    ids = random_ids(CONFIG, ROWS, LENGTH)
    positions = np.random.default_rng(1).integers(0, CONFIG.n_positions, ids.shape)
    with torch.no_grad():
        peer = transformers_model(checkpoint)(
            torch.from_numpy(ids), position_ids=torch.from_numpy(positions), attention_mask=torch.ones(ids.shape)
        ).logits.numpy()
    assert np.abs(logits(checkpoint, ids, position_ids=positions) - peer).max() <= FP64_ABSOLUTE


@each_logits
@each_packing
def test_explicit_positions_replace_those_of_the_segments(packing: str, logits: Answer, checkpoint: Checkpoint) -> None:
    batch = packed(packing)
    ids, segments = batch["input_ids"], batch["segment_ids"]
    positions = np.zeros_like(ids)
    for row, document in documents(segments):
        positions[row, document] = np.arange(len(document))
    given = logits(checkpoint, ids, segment_ids=segments, position_ids=positions)
    real = segments != 0
    assert np.abs(given - logits(checkpoint, ids, segment_ids=segments))[real].max() <= FP64_ABSOLUTE
    moved = logits(checkpoint, ids, segment_ids=segments, position_ids=positions + 3)
    assert np.abs(moved - given)[real].max() > 0.1


@pytest.mark.parametrize("backend", [gpt2_torch.model, gpt2_jax.model], ids=["torch", "jax"])
def test_positions_count_the_tokens_of_the_segment(backend: Any) -> None:
    segments = np.array([[1, 1, 2, 2, 2, 3, 0, 0], [5, 2, 5, 2, 0, 5, -1, 5]])
    as_array = torch.from_numpy if backend is gpt2_torch.model else jnp.asarray
    ids = as_array(segments)
    expected = [[0, 1, 0, 1, 2, 0, 0, 1], [0, 0, 1, 1, 0, 2, 0, 3]]
    assert backend.positions(ids, None, ids).tolist() == expected


REFUSED: dict[str, tuple[Batch, type[Exception], str]] = {
    "segments and a mask": (
        {"segment_ids": np.ones((2, 17), int), "attention_mask": np.ones((2, 17), int)},
        ValueError,
        "pass attention_mask or segment_ids, not both",
    ),
    "segments of another length": (
        {"segment_ids": np.ones((2, 16), int)},
        ValueError,
        r"segment_ids has shape \(2, 16\), but input_ids has \(2, 17\)",
    ),
    "positions without rows": (
        {"position_ids": np.ones(17, int)},
        ValueError,
        r"position_ids has shape \(17,\), but input_ids has \(2, 17\)",
    ),
    "a negative position": (
        {"position_ids": np.full((2, 17), -1)},
        IndexError,
        "position_ids from -1 to -1; the positions are 0 to 39",
    ),
    "a position too many": (
        {"position_ids": np.arange(24, 41)[None].repeat(2, 0)},
        IndexError,
        "position_ids from 24 to 40; the positions are 0 to 39",
    ),
}


@pytest.mark.parametrize(("given", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_segments_and_positions_are_refused(given: Batch, error: type[Exception], message: str) -> None:
    checkpoint, ids = random_checkpoint(CONFIG), random_ids(CONFIG)
    with pytest.raises(error, match=message):
        torch_logits(checkpoint, ids, **given)
    model, params = jax_model(checkpoint)
    with pytest.raises(error, match=message):
        model.apply({"params": params}, ids, **given)


def test_inside_jit_a_position_that_does_not_exist_gives_nan() -> None:
    positions = np.zeros((2, 17), int)
    positions[1, 4] = CONFIG.n_positions
    logits = jax_logits(random_checkpoint(CONFIG), random_ids(CONFIG), position_ids=positions)
    assert np.isfinite(logits[0]).all() and np.isnan(logits[1]).all()


def test_a_cache_takes_no_segments() -> None:
    checkpoint, ids = random_checkpoint(CONFIG), random_ids(CONFIG)
    model, params = jax_model(checkpoint)
    with pytest.raises(TypeError, match="segment_ids"):
        model.apply({"params": params}, ids, None, segment_ids=ids, method="decode")
    with pytest.raises(TypeError, match="segment_ids"):
        torch_model(checkpoint).decode(torch.from_numpy(ids), None, segment_ids=ids)

"""Decoding with a key/value cache gives the logits of a run of the whole sequence, at every position and for every
division of the sequence into pieces."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.implementations import jax_logits, relative_error, torch_logits, torch_model
from support.models import TINY, random_checkpoint, random_ids, random_state

import gpt2_jax
import gpt2_torch
from bridge import Checkpoint, GPT2Config
from gpt2_jax import KVCache, empty_cache
from gpt2_jax.generation import Decoder

ROUNDING = {np.float32: 1e-5, np.float64: 1e-12}
"""Largest difference relative to the largest logit. A product with one row is summed in another order than one with
many, which gives differences of 5e-7 and 1e-15."""
A_MISTAKE = 1e-2
"""The same measure for wrong keys, values or positions: far above rounding."""

CONFIG = replace(TINY, n_layer=2)  # enough for layers to differ; each length of a piece is compiled for each variant
LENGTH = 13
MAX_LENGTH = LENGTH + 3  # unwritten positions must have no effect
PADDING = {"rows of one length": (0, 0, 0), "left padding": (0, 8, 4)}
PIECES = {"all at once": (13,), "one by one": (1,) * 13, "odd pieces": (3, 1, 3, 3, 3)}


@dataclass(frozen=True)
class Variant:
    config: GPT2Config
    form: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Options of the Flax model."""


VARIANTS = {
    "plain": Variant(CONFIG),
    "inverse layer index": Variant(replace(CONFIG, scale_attn_by_inverse_layer_idx=True)),
    "untied head": Variant(replace(CONFIG, tie_word_embeddings=False)),
    "no biases": Variant(replace(CONFIG, bias=False)),
    "upcast attention": Variant(replace(CONFIG, reorder_and_upcast_attn=True)),
    "padded vocabulary": Variant(CONFIG, {"vocab_multiple": 64}),
    "stacked layers": Variant(replace(CONFIG, scale_attn_by_inverse_layer_idx=True), {"scan": True}),
}


class TorchSide:
    logits = staticmethod(torch_logits)

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.model = torch_model(checkpoint)

    def empty_cache(self, padding: tuple[int, ...]) -> gpt2_torch.KVCache:
        return gpt2_torch.empty_cache(self.model.config, torch.tensor(padding), MAX_LENGTH, self.model.wte.weight.dtype)

    def decode(
        self, ids: np.ndarray, cache: gpt2_torch.KVCache, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, Any]:
        given = None if mask is None else torch.from_numpy(mask)
        with torch.no_grad():
            return self.model.head(self.model.decode(torch.from_numpy(ids), cache, given)).numpy(), cache


class JaxSide:
    """Decodes with the model and the parameters of a `Decoder`, which unstacks layers."""

    def __init__(self, checkpoint: Checkpoint, **form: Any) -> None:
        self.logits = functools.partial(jax_logits, **form)
        dtype = checkpoint.tensors["wte.weight"].dtype
        self.decoder = Decoder(*gpt2_jax.model_from_checkpoint(checkpoint, dtype=dtype, **form))

    def empty_cache(self, padding: tuple[int, ...]) -> KVCache:
        return empty_cache(self.decoder.config, jnp.asarray(padding), MAX_LENGTH, self.decoder.model.dtype)

    def decode(self, ids: np.ndarray, cache: Any, mask: np.ndarray | None = None) -> tuple[np.ndarray, Any]:
        logits, cache = _extended(self.decoder.model, self.decoder.params, jnp.asarray(ids), cache, mask)
        return np.asarray(logits), cache


@functools.partial(jax.jit, static_argnums=0)
def _extended(
    model: gpt2_jax.GPT2, params: Any, ids: jax.Array, cache: Any, mask: np.ndarray | None
) -> tuple[Any, Any]:
    x, cache = model.apply({"params": params}, ids, cache, mask, method="decode")
    return model.apply({"params": params}, x, method="head"), cache


def sides(variant: Variant, dtype: Any) -> dict[str, TorchSide | JaxSide]:
    checkpoint = random_checkpoint(variant.config, dtype)
    return {"gpt2_torch": TorchSide(checkpoint), "gpt2_jax": JaxSide(checkpoint, **variant.form)}


def logits_in_pieces(
    side: TorchSide | JaxSide, ids: np.ndarray, padding: tuple[int, ...], pieces: tuple[int, ...]
) -> np.ndarray:
    cache: Any = side.empty_cache(padding)
    found = []
    for piece in np.split(ids, np.cumsum(pieces)[:-1], axis=1):
        logits, cache = side.decode(piece, cache)
        found.append(logits)
    return np.concatenate(found, axis=1)


def mask_of(padding: tuple[int, ...]) -> np.ndarray:
    return (np.arange(LENGTH) >= np.array(padding)[:, None]).astype(np.int64)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_logits_equal_those_of_the_whole_sequence(variant: str, dtype: Any) -> None:
    with jax.enable_x64(dtype is np.float64):
        checkpoint = random_checkpoint(VARIANTS[variant].config, dtype)
        ids = random_ids(CONFIG, batch=3, length=LENGTH)
        for name, side in sides(VARIANTS[variant], dtype).items():
            for rows, padding in PADDING.items():
                mask = mask_of(padding)
                expected = side.logits(checkpoint, ids, mask)[mask > 0]
                for how, pieces in PIECES.items():
                    found = logits_in_pieces(side, ids, padding, pieces)
                    assert np.isfinite(found).all(), (name, rows, how)  # at padding, too
                    assert found.dtype == dtype
                    assert relative_error(found[mask > 0], expected) <= ROUNDING[dtype], (name, rows, how)


HOLES = np.array([[1] * 13, [0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1], [1, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1]])
"""Rows with padding on the left, inside and on the right of pieces."""


@pytest.mark.parametrize("num_padding", [(0, 0, 0), (0, 2, 0)], ids=["mask", "mask and num_padding"])
def test_a_cache_takes_masks(num_padding: tuple[int, ...]) -> None:
    """Padding on either side of a piece, and a later call without a mask, equal the whole sequence with the mask."""
    ids = random_ids(CONFIG, batch=3, length=LENGTH)
    mask = HOLES
    for name, side in sides(VARIANTS["plain"], np.float32).items():
        expected, found = side.logits(random_checkpoint(CONFIG), ids, mask), []
        cache: Any = side.empty_cache(num_padding)
        for piece, given in ((slice(0, 5), mask[:, :5]), (slice(5, 10), mask[:, 5:10]), (slice(10, 13), None)):
            logits, cache = side.decode(ids[:, piece], cache, given)
            found.append(logits)
            cache = cache.select_rows(np.array([0, 1, 2]))
        logits = np.concatenate(found, axis=1)
        assert np.isfinite(logits).all(), name
        assert relative_error(logits[mask > 0], expected[mask > 0]) <= ROUNDING[np.float32], name


def changed(cache: Any, **fields: Any) -> Any:
    return cache._replace(**fields) if isinstance(cache, KVCache) else replace(cache, **fields)


MISTAKES: dict[str, Callable[[Any], Any]] = {
    "a position is skipped": lambda cache: changed(cache, length=cache.length + 1),
    "a token is overwritten": lambda cache: changed(cache, length=cache.length - 1),
    "a row's first token counts as padding": lambda cache: changed(cache, num_padding=cache.num_padding + 1),
    "values are one position too late": lambda cache: changed(
        cache, values=type(cache.values)(values[..., [0, *range(MAX_LENGTH - 1)], :] for values in cache.values)
    ),
    "keys are those of another layer": lambda cache: changed(cache, keys=cache.keys[::-1]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_cache_is_detected(mistake: str) -> None:
    ids, known = random_ids(CONFIG, batch=3, length=LENGTH), LENGTH - 3
    for name, side in sides(VARIANTS["plain"], np.float32).items():
        right = side.logits(random_checkpoint(CONFIG), ids, mask_of((0, 0, 0)))[:, known:]
        cache: Any = side.empty_cache((0, 0, 0))
        for at in range(known):
            _, cache = side.decode(ids[:, at : at + 1], cache)
        wrong, _ = side.decode(ids[:, known:], MISTAKES[mistake](cache))
        assert relative_error(wrong, right) > A_MISTAKE, name


def test_a_mistake_in_the_positions_alone_is_detected() -> None:
    ids, state = random_ids(CONFIG, batch=3, length=LENGTH), random_state(CONFIG)
    shifted = Checkpoint.of(state | {"wpe.weight": np.roll(state["wpe.weight"], 1, axis=0)}, CONFIG)
    for side in (TorchSide, JaxSide):
        right, wrong = (
            logits_in_pieces(side(checkpoint), ids, (0, 0, 0), (1,) * LENGTH)
            for checkpoint in (random_checkpoint(CONFIG), shifted)
        )
        assert np.abs(wrong - right).max(axis=-1).min() > A_MISTAKE * np.abs(right).max(), side.__name__

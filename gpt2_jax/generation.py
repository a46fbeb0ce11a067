"""Generation from the port: a key/value cache, and compiled loops over it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from bridge.generation import decoder as decoding
from bridge.generation.config import GenerationConfig
from bridge.generation.decoder import ENDED, INVALID, Chunk, with_continuations
from gpt2_jax.logits_processors import Filters, choose
from gpt2_jax.model import GPT2, KVCache, check_form, empty_cache

SHORTEST_BUCKET = 16
"""Slots of the smallest cache, for which loops are compiled; then powers of two."""

PREFILL_CHUNK = 256
"""Longer prompts run in chunks of so many tokens: one compilation serves any number of chunks."""


def generate(
    model: GPT2,
    params: Mapping[str, Any],
    input_ids: Int[Array, "B T"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    samples: int = 1,
    stop_ids: Sequence[int] = (),
    slide: bool = False,
    beams: int = 1,
    length_penalty: float = 1.0,
    seed: int = 0,
) -> Int[Array, "B*samples T+new"]:
    """Return each prompt followed by `max_new_tokens` tokens. The arguments are fields of `bridge.GenerationConfig`.

    After a stop id, the rest of the row is filled with the first of `stop_ids`. Use `Decoder` for prompts of different
    lengths, for streaming or for log-probabilities. It also prepares the parameters only once for many calls.

    Raises `ValueError` for an invalid request or for logits that are NaN or infinite, and `IndexError` for an id
    outside the vocabulary.
    """
    check_form(input_ids)
    request = GenerationConfig(
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        samples=samples,
        stop_ids=tuple(stop_ids),
        slide=slide,
        beams=beams,
        length_penalty=length_penalty,
    )
    prompts = np.asarray(input_ids)
    found = Decoder(model, params).generate(prompts.tolist(), request)
    return jnp.asarray(with_continuations(prompts, found, request))


class _State(NamedTuple):
    """Of the loop over tokens. R rows, V vocabulary, N the most tokens that it can make."""

    cache: KVCache
    ids_RN: Int[Array, "R N"]
    """`ENDED` before a token is chosen and after the end of a row; `INVALID` if no token could be chosen."""
    log_probs_RN: Float[Array, "R N"] | None
    draws_RN: Float[Array, "R N"]
    seen_RV: Bool[Array, "R V"] | None
    """The tokens of each row, where their repetition is penalized."""
    made: Int[Array, ""]
    ended_R: Bool[Array, " R"]
    stop_ids: Int[Array, " stops"]
    filters: Filters


class Decoder(decoding.Decoder[_State, KVCache]):
    """Generation from one model and its parameters, in one compiled loop per bucket of lengths.

    The function that makes tokens is compiled once for a number of rows and a power of two of tokens in each, and
    for a set of filters; the one that runs prompts also for the power of two of the prompts' length, up to
    `PREFILL_CHUNK`. Sharded parameters (over a mesh with Auto axes) stay as they are sharded, and the
    compiler spreads the work over the mesh.

    Args:
        params: stacked layers are taken apart here, once: a loop over tokens would copy them out for each.
        dtype: of the parameters and the computation; None leaves both as they are. bfloat16 halves the bytes
            that are read for every token, which is what a token costs on GPU and TPU.
    """

    def __init__(self, model: GPT2, params: Mapping[str, Any], *, dtype: DTypeLike | None = None) -> None:
        self.config = model.config
        self.model = model.clone(scan=False, dtype=model.dtype if dtype is None else jnp.dtype(dtype))
        # On the device, once: numpy arrays would go there again with every call.
        params = jax.tree.map(jnp.asarray, params)
        self.params = params if dtype is None and not model.scan else _prepared(model, dtype, params)

    def _begin(
        self,
        ids: np.ndarray,
        padding: np.ndarray,
        slots: int,
        request: GenerationConfig,
        draws: np.ndarray,
        ended: np.ndarray,
        copies: int,
    ) -> _State:
        cache, logits_RV = self._prefilled(ids, padding, slots)
        if copies > 1:
            cache, logits_RV = _repeated(copies, cache, logits_RV)
        R, S = draws.shape[0], cache.values[0].shape[1]
        seen = None
        if request.repetition_penalty is not None:
            seen = np.zeros((R, self.config.vocab_size), bool)
            for r in range(R):
                seen[r, ids[r // copies, padding[r // copies] :]] = True
        state = _State(
            cache=cache,
            ids_RN=jnp.full((R, S), ENDED, jnp.int32),
            log_probs_RN=jnp.zeros((R, S), jnp.float32) if request.log_probs else None,
            draws_RN=jnp.asarray(np.pad(draws, ((0, 0), (0, S - draws.shape[1])))),
            seen_RV=None if seen is None else jnp.asarray(seen),
            made=jnp.zeros((), jnp.int32),
            ended_R=jnp.asarray(ended),
            stop_ids=jnp.asarray(request.stop_ids, jnp.int32),
            filters=Filters.of(request),
        )
        return _first_token(state, logits_RV)

    def _advance(self, state: _State, steps: int) -> _State:
        return _more_tokens(self.model, self.params, state, steps)

    def _made(self, state: _State, first: int, number: int) -> Chunk:
        made = slice(first, first + number)
        log_probs = None if state.log_probs_RN is None else np.asarray(state.log_probs_RN)[:, made]
        return Chunk(np.asarray(state.ids_RN)[:, made], log_probs)

    def _begin_beams(
        self, ids: np.ndarray, padding: np.ndarray, slots: int, beams: int, candidates: int
    ) -> tuple[KVCache, np.ndarray, np.ndarray]:
        cache, logits_RV = _repeated(beams, *self._prefilled(ids, padding, slots))
        return cache, *_fetched(_likeliest(candidates, logits_RV))

    def _advance_beams(
        self, state: KVCache, parents: np.ndarray, tokens: np.ndarray, candidates: int
    ) -> tuple[KVCache, np.ndarray, np.ndarray]:
        cache, *likeliest = _more_beams(self.model, candidates, self.params, state, parents, tokens)
        return cache, *_fetched(likeliest)

    def _prefilled(self, ids: np.ndarray, padding: np.ndarray, slots: int) -> tuple[KVCache, Float[Array, "B V"]]:
        S = bucket(slots, self.config.n_positions)
        chunk = min(bucket(ids.shape[1], self.config.n_positions), PREFILL_CHUNK)
        length = ids.shape[1]
        return _prefill(self.model, S, chunk, self.params, np.pad(ids, ((0, 0), (0, S - length))), padding, length)


def bucket(length: int, most: int) -> int:
    """The power of two that `length` is compiled for, from `SHORTEST_BUCKET` and up to `most`."""
    return min(max(SHORTEST_BUCKET, 1 << (length - 1).bit_length()), most)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prepared(model: GPT2, dtype: DTypeLike | None, params: Mapping[str, Any]) -> dict[str, Any]:
    """One entry per layer, in the dtype."""
    tree = dict(params)
    if model.scan:
        stack = tree.pop("h")
        tree |= {f"h_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(model.config.n_layer)}
    return tree if dtype is None else jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(
    model: GPT2,
    slots: int,
    chunk: int,
    params: Mapping[str, Any],
    ids_BS: Int[Array, "B S"],
    padding_B: Int[Array, " B"],
    length: int | Int[Array, ""],
) -> tuple[KVCache, Float[Array, "B V"]]:
    """Run the first `length` ids of each row; the cache, and the logits of what follows."""
    # The last chunk ends where the prompts do, and so begins before the one before it ends: running some tokens
    # twice changes nothing. A prompt shorter than a chunk is followed by slots that are written again later.
    length = jnp.asarray(length, jnp.int32)
    start = jnp.maximum(length - chunk, 0)

    def run(i: Int[Array, ""], carried: tuple[KVCache, Array]) -> tuple[KVCache, Array]:
        cache, _ = carried
        begin = jnp.minimum(i.astype(jnp.int32) * chunk, start)
        part = jax.lax.dynamic_slice_in_dim(ids_BS, begin, chunk, axis=1)
        x_BTD, cache = _extend(model, params, part, cache._replace(length=begin))
        return cache, x_BTD[:, length - 1 - begin]

    cache = empty_cache(model.config, padding_B, slots, model.dtype)
    last_BD = jnp.zeros((ids_BS.shape[0], model.config.n_embd), model.dtype)
    cache, last_BD = jax.lax.fori_loop(0, -(-length // chunk), run, (cache, last_BD))
    return cache._replace(length=length), _logits(model, params, last_BD)


@functools.partial(jax.jit, donate_argnums=0)
def _first_token(state: _State, logits_RV: Float[Array, "R V"]) -> _State:
    return _with_token(state, logits_RV)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _more_tokens(model: GPT2, params: Mapping[str, Any], state: _State, steps: int) -> _State:
    """`steps` more tokens, or fewer if all rows end before."""
    end = state.made + steps

    def goes_on(state: _State) -> Bool[Array, ""]:
        return (state.made < end) & ~state.ended_R.all()

    def add_token(state: _State) -> _State:
        last_R1 = jax.lax.dynamic_slice_in_dim(state.ids_RN, state.made - 1, 1, axis=1)
        x_RTD, cache = _extend(model, params, jnp.maximum(last_R1, 0), state.cache)
        return _with_token(state._replace(cache=cache), _logits(model, params, x_RTD[:, 0]))

    return jax.lax.while_loop(goes_on, add_token, state)


def _with_token(state: _State, logits_RV: Float[Array, "R V"]) -> _State:
    """The state with one more token in each row that has not ended."""
    write, n = jax.lax.dynamic_update_slice_in_dim, state.made
    chosen_R = choose(logits_RV, state.draws_RN[:, n], state.filters, state.seen_RV)
    log_probs_RN, seen_RV = state.log_probs_RN, state.seen_RV
    if log_probs_RN is not None:
        log_probs_RV = jax.nn.log_softmax(logits_RV.astype(jnp.float32), axis=-1)
        log_probs_RN = write(log_probs_RN, jnp.take_along_axis(log_probs_RV, chosen_R[:, None], axis=1), n, axis=1)
    if seen_RV is not None:
        seen_RV = seen_RV.at[jnp.arange(len(chosen_R)), chosen_R].set(True)
    invalid_R = _are_invalid(logits_RV) & ~state.ended_R
    new_R = jnp.where(state.ended_R, ENDED, jnp.where(invalid_R, INVALID, chosen_R))
    return state._replace(
        ids_RN=write(state.ids_RN, new_R[:, None], n, axis=1),
        log_probs_RN=log_probs_RN,
        seen_RV=seen_RV,
        made=n + 1,
        ended_R=state.ended_R | (chosen_R[:, None] == state.stop_ids).any(-1) | invalid_R.any(),
    )


def _are_invalid(logits_RV: Float[Array, "R V"]) -> Bool[Array, " R"]:
    """Whether a row has NaN or +inf, or only -inf; see `bridge.generation.decoder.INVALID`."""
    return jnp.isnan(logits_RV).any(-1) | jnp.isinf(logits_RV.max(-1))


@functools.partial(jax.jit, static_argnums=0)
def _repeated(times: int, cache: KVCache, logits_BV: Float[Array, "B V"]) -> tuple[KVCache, Float[Array, "R V"]]:
    """Every row so many times, one after the other."""
    return _each_row(cache, lambda array: jnp.repeat(array, times, axis=0)), jnp.repeat(logits_BV, times, axis=0)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _more_beams(
    model: GPT2,
    candidates: int,
    params: Mapping[str, Any],
    cache: KVCache,
    parents_R: Int[Array, " R"],
    tokens_R: Int[Array, " R"],
) -> tuple[KVCache, Float[Array, "R N"], Int[Array, "R N"]]:
    cache = _each_row(cache, lambda array: array[parents_R])
    x_RTD, cache = _extend(model, params, tokens_R[:, None], cache)
    return cache, *_likeliest(candidates, _logits(model, params, x_RTD[:, 0]))


@functools.partial(jax.jit, static_argnums=0)
def _likeliest(number: int, logits_RV: Float[Array, "R V"]) -> tuple[Float[Array, "R N"], Int[Array, "R N"]]:
    """Log-probabilities and ids of the likeliest tokens."""
    log_probs_RN, ids_RN = jax.lax.top_k(jax.nn.log_softmax(logits_RV.astype(jnp.float32), axis=-1), number)
    return log_probs_RN, ids_RN


def _fetched(arrays: Sequence[Array]) -> list[np.ndarray]:
    return [np.asarray(array) for array in arrays]


def _each_row(cache: KVCache, change: Callable[[Array], Array]) -> KVCache:
    """The cache with other rows, as `change` makes them of an array's first axis."""
    B = cache.padding.shape[0]

    def changed(array: Array) -> Array:
        return change(array.reshape(B, -1, *array.shape[1:])).reshape(-1, *array.shape[1:])

    keys, values = (tuple(map(changed, arrays)) for arrays in (cache.keys, cache.values))
    return KVCache(keys, values, change(cache.padding), cache.length)


def _extend(model: GPT2, params: Mapping[str, Any], ids: Array, cache: KVCache) -> tuple[Array, KVCache]:
    extended: Any = model.apply({"params": params}, ids, cache, method="extend")
    return extended


def _logits(model: GPT2, params: Mapping[str, Any], x: Array) -> Array:
    logits: Any = model.apply({"params": params}, x, method="head")
    return logits

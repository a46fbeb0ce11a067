"""Text generation with the JAX model: a preallocated key/value cache, and compiled loops over tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

import bridge.generation.decoder
from bridge.generation.config import GenerationConfig
from bridge.generation.output import ENDED, INVALID, Candidates, Chunk, concatenate
from bridge.generation.processors import LogitsProcessors, padded_ids, seen_tokens
from gpt2_jax.logits_processors import History, on_device, process_logits
from gpt2_jax.model import GPT2, check_shape
from gpt2_jax.ops.kv_cache import KVCache, empty_cache
from gpt2_jax.sampling import select_token

SMALLEST_BUCKET = 16
"""The smallest compiled cache length. Longer ones are powers of two, up to the model's positions."""

PREFILL_CHUNK = 256
"""Longer prompts run in chunks of this many tokens. One compilation serves any number of chunks."""


def generate(
    model: GPT2,
    params: Mapping[str, Any],
    input_ids: Int[Array, "B T"],
    generation_config: GenerationConfig | None = None,
    **overrides: Any,
) -> Int[Array, "B*num_return_sequences T+new"]:
    """Return each prompt followed by `max_new_tokens` new tokens.

    Rows that end early are filled with the first of `eos_token_ids`. Use `Decoder` for prompts of different lengths,
    for streaming, or for log-probabilities. A `Decoder` also prepares the parameters only once for many calls.

    Args:
        params: the model's parameters.
        input_ids: prompts of one length.
        generation_config: the configuration.
        **overrides: fields of `bridge.GenerationConfig`, which replace those of `generation_config`. Without
            `generation_config`, `max_new_tokens` is required.

    Raises `ValueError` for an invalid configuration or for logits that are NaN or infinite, and `IndexError` for an id
    outside the vocabulary.
    """
    check_shape(input_ids)
    config = GenerationConfig.of(generation_config, overrides)
    prompts = np.asarray(input_ids)
    outputs = Decoder(model, params).generate(prompts.tolist(), config)
    return jnp.asarray(concatenate(prompts, outputs, config))


class _State(NamedTuple):
    """The state of the loop over tokens. R rows, V vocabulary, N the maximum number of new tokens."""

    cache: KVCache
    ids_RN: Int[Array, "R N"]
    """`ENDED` before a token is selected and after the end of a row; `INVALID` if no token could be selected."""
    logprobs_RN: Float[Array, "R N"] | None
    noise_RN: Float[Array, "R N"]
    history_RS: Int[Array, "R S"] | None
    """`ids_RS` of the `History`."""
    seen_RV: Bool[Array, "R V"] | None
    """`seen_RV` of the `History`."""
    ended_R: Bool[Array, " R"]
    eos_token_ids: Int[Array, " eos"]
    processors: LogitsProcessors
    num_new: Int[Array, ""]


class _Beams(NamedTuple):
    """The state of beam search."""

    cache: KVCache
    history_RS: Int[Array, "R S"] | None
    seen_RV: Bool[Array, "R V"] | None
    processors: LogitsProcessors
    num_new: Int[Array, ""]


_Candidates = tuple[Int[Array, "R N"], Float[Array, "R N"], Float[Array, "R N"]]
"""`bridge.generation.output.Candidates` on the device."""


class Decoder(bridge.generation.decoder.Decoder[_State, _Beams]):
    """Generation from one model and its parameters, in one compiled loop per bucket of lengths.

    The decoding loop is compiled once for each combination of the number of rows, the cache length (see `bucket`) and
    the set of logits processors. Prefill is also compiled for each bucket of prompt lengths, up to `PREFILL_CHUNK`.
    Sharded parameters (over a mesh with Auto axes) stay sharded, and the compiler distributes the computation over the
    mesh.

    Args:
        params: the model's parameters. Stacked layers are unstacked here, once; the loop over tokens would copy them
            for every token.
        dtype: the dtype of the parameters and the computation. None keeps both. bfloat16 halves the bytes that are read
            for every token, which determine the speed on GPU and TPU.
    """

    def __init__(self, model: GPT2, params: Mapping[str, Any], *, dtype: DTypeLike | None = None) -> None:
        self.config = model.config
        self.model = model.clone(scan=False, dtype=model.dtype if dtype is None else jnp.dtype(dtype))
        # Moved to the device once; numpy arrays would be copied there in every call.
        params = jax.tree.map(jnp.asarray, params)
        self.params = params if dtype is None and not model.scan else _prepare(model, dtype, params)

    def _prefill(
        self,
        ids: np.ndarray,
        num_padding: np.ndarray,
        max_length: int,
        generation_config: GenerationConfig,
        noise: np.ndarray,
        ended: np.ndarray,
        copies: int,
    ) -> _State:
        cache, logits_RV = self._prefill_cache(ids, num_padding, max_length)
        if copies > 1:
            cache, logits_RV = _repeat_rows(copies, cache, logits_RV)
        R, S = noise.shape[0], cache.max_length
        processors = on_device(generation_config, self.config.vocab_size)
        history, seen = self._history(processors, ids, num_padding, S, copies)
        state = _State(
            cache=cache,
            ids_RN=jnp.full((R, S), ENDED, jnp.int32),
            logprobs_RN=jnp.zeros((R, S), jnp.float32) if generation_config.logprobs else None,
            noise_RN=jnp.asarray(np.pad(noise, ((0, 0), (0, S - noise.shape[1])))),
            history_RS=history,
            seen_RV=seen,
            ended_R=jnp.asarray(ended),
            eos_token_ids=jnp.asarray(generation_config.eos_token_ids, jnp.int32),
            processors=processors,
            num_new=jnp.zeros((), jnp.int32),
        )
        return _first_token(state, logits_RV)

    def _decode(self, state: _State, steps: int) -> _State:
        return _decode_loop(self.model, self.params, state, steps)

    def _chunk(self, state: _State, first: int, count: int) -> Chunk:
        new = slice(first, first + count)
        logprobs = None if state.logprobs_RN is None else np.asarray(state.logprobs_RN)[:, new]
        return Chunk(np.asarray(state.ids_RN)[:, new], logprobs)

    def prefill_beams(
        self, ids: np.ndarray, num_padding: np.ndarray, max_length: int, config: GenerationConfig, num_candidates: int
    ) -> tuple[_Beams, Candidates]:
        cache, logits_RV = _repeat_rows(config.num_beams, *self._prefill_cache(ids, num_padding, max_length))
        processors = on_device(config, self.config.vocab_size)
        history, seen = self._history(processors, ids, num_padding, cache.max_length, config.num_beams)
        beams = _Beams(cache, history, seen, processors, jnp.zeros((), jnp.int32))
        return beams, _on_host(_most_likely(num_candidates, beams, logits_RV))

    def decode_beams(
        self, beams: _Beams, parents: np.ndarray, tokens: np.ndarray, num_candidates: int
    ) -> tuple[_Beams, Candidates]:
        beams, candidates = _decode_beams(self.model, num_candidates, self.params, beams, parents, tokens)
        return beams, _on_host(candidates)

    def _history(
        self, processors: LogitsProcessors, ids: np.ndarray, num_padding: np.ndarray, max_length: int, copies: int
    ) -> tuple[Array | None, Array | None]:
        """Return what the processors need of the prompts' tokens: `ids_RS` and `seen_RV` of a `History`."""
        history = padded_ids(ids, num_padding, max_length, copies)
        needs_seen = processors.repetition_penalty is not None
        seen = jnp.asarray(seen_tokens(history, self.config.vocab_size)) if needs_seen else None
        return jnp.asarray(history) if processors.needs_ids else None, seen

    def _prefill_cache(
        self, ids: np.ndarray, num_padding: np.ndarray, max_length: int
    ) -> tuple[KVCache, Float[Array, "B V"]]:
        """Run the prompts. Returns the cache and the next token's logits."""
        S = bucket(max_length, self.config.n_positions)
        chunk = min(bucket(ids.shape[1], self.config.n_positions), PREFILL_CHUNK)
        length = ids.shape[1]
        ids_BS = np.pad(ids, ((0, 0), (0, S - length)))
        return _prefill_chunks(self.model, chunk, self.params, ids_BS, num_padding, length)


def bucket(length: int, limit: int) -> int:
    """Return `length` rounded up to a power of two, at least `SMALLEST_BUCKET` and at most `limit`."""
    return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), limit)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prepare(model: GPT2, dtype: DTypeLike | None, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters with one entry per layer, in `dtype`."""
    tree = dict(params)
    if model.scan:
        stack = tree.pop("h")
        tree |= {f"h_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(model.config.n_layer)}
    return tree if dtype is None else jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill_chunks(
    model: GPT2,
    chunk: int,
    params: Mapping[str, Any],
    ids_BS: Int[Array, "B S"],
    num_padding_B: Int[Array, " B"],
    length: int | Int[Array, ""],
) -> tuple[KVCache, Float[Array, "B V"]]:
    """Run the first `length` ids of each row in chunks. Returns the cache and the next token's logits."""
    # The last chunk ends at `length`, so it may start inside the chunk before it; running tokens twice changes nothing.
    # A prompt shorter than a chunk writes to positions after `length`, which decoding overwrites.
    length = jnp.asarray(length, jnp.int32)
    last_start = jnp.maximum(length - chunk, 0)

    def run(i: Int[Array, ""], carry: tuple[KVCache, Array]) -> tuple[KVCache, Array]:
        cache, _ = carry
        start = jnp.minimum(i.astype(jnp.int32) * chunk, last_start)
        ids_BT = jax.lax.dynamic_slice_in_dim(ids_BS, start, chunk, axis=1)
        x_BTD, cache = _apply_decode(model, params, ids_BT, cache._replace(length=start))
        return cache, x_BTD[:, length - 1 - start]

    cache = empty_cache(model.config, num_padding_B, ids_BS.shape[1], model.dtype)
    x_BD = jnp.zeros((ids_BS.shape[0], model.config.n_embd), model.dtype)
    cache, x_BD = jax.lax.fori_loop(0, -(-length // chunk), run, (cache, x_BD))
    return cache._replace(length=length), _apply_head(model, params, x_BD)


@functools.partial(jax.jit, donate_argnums=0)
def _first_token(state: _State, logits_RV: Float[Array, "R V"]) -> _State:
    return _add_token(state, logits_RV)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode_loop(model: GPT2, params: Mapping[str, Any], state: _State, steps: int) -> _State:
    """Select `steps` more tokens in each row, or fewer if all rows end earlier."""
    end = state.num_new + steps

    def is_unfinished(state: _State) -> Bool[Array, ""]:
        return (state.num_new < end) & ~state.ended_R.all()

    def step(state: _State) -> _State:
        last_R1 = jax.lax.dynamic_slice_in_dim(state.ids_RN, state.num_new - 1, 1, axis=1)
        x_RTD, cache = _apply_decode(model, params, jnp.maximum(last_R1, 0), state.cache)
        return _add_token(state._replace(cache=cache), _apply_head(model, params, x_RTD[:, 0]))

    return jax.lax.while_loop(is_unfinished, step, state)


def _add_token(state: _State, logits_RV: Float[Array, "R V"]) -> _State:
    """Select one more token in each row that has not ended."""
    write, n = jax.lax.dynamic_update_slice_in_dim, state.num_new
    history = History(state.history_RS, state.seen_RV, state.cache.length, n)
    processed_RV = process_logits(logits_RV, state.processors, history)
    token_R = select_token(processed_RV, state.noise_RN[:, n], state.processors)
    logprobs_RN = state.logprobs_RN
    if logprobs_RN is not None:
        logprobs_RV = jax.nn.log_softmax(logits_RV.astype(jnp.float32), axis=-1)
        logprobs_RN = write(logprobs_RN, jnp.take_along_axis(logprobs_RV, token_R[:, None], axis=1), n, axis=1)
    history = history.followed_by(token_R)
    invalid_R = _are_invalid(logits_RV)
    if state.processors.temperature is not None and state.processors.change_scores:
        invalid_R |= jnp.isinf(processed_RV.max(-1))  # no token is left to sample
    invalid_R &= ~state.ended_R
    new_R = jnp.where(state.ended_R, ENDED, jnp.where(invalid_R, INVALID, token_R))
    return state._replace(
        ids_RN=write(state.ids_RN, new_R[:, None], n, axis=1),
        logprobs_RN=logprobs_RN,
        history_RS=history.ids_RS,
        seen_RV=history.seen_RV,
        ended_R=state.ended_R | (token_R[:, None] == state.eos_token_ids).any(-1) | invalid_R.any(),
        num_new=history.num_new,
    )


def _are_invalid(logits_RV: Float[Array, "R V"]) -> Bool[Array, " R"]:
    """Whether a row has NaN or +inf, or only -inf; see `bridge.generation.output.INVALID`."""
    return jnp.isnan(logits_RV).any(-1) | jnp.isinf(logits_RV.max(-1))


@functools.partial(jax.jit, static_argnums=0)
def _repeat_rows(times: int, cache: KVCache, logits_BV: Float[Array, "B V"]) -> tuple[KVCache, Float[Array, "R V"]]:
    """Repeat each row `times` times. The copies of a row are adjacent."""
    rows = jnp.repeat(jnp.arange(logits_BV.shape[0]), times)
    return cache.select_rows(rows), logits_BV[rows]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _decode_beams(
    model: GPT2,
    num_candidates: int,
    params: Mapping[str, Any],
    beams: _Beams,
    parents_R: Int[Array, " R"],
    tokens_R: Int[Array, " R"],
) -> tuple[_Beams, _Candidates]:
    history = History(beams.history_RS, beams.seen_RV, beams.cache.length, beams.num_new)
    history = history.select_rows(parents_R).followed_by(tokens_R)
    x_RTD, cache = _apply_decode(model, params, tokens_R[:, None], beams.cache.select_rows(parents_R))
    beams = _Beams(cache, history.ids_RS, history.seen_RV, beams.processors, history.num_new)
    return beams, _most_likely(num_candidates, beams, _apply_head(model, params, x_RTD[:, 0]))


@functools.partial(jax.jit, static_argnums=0)
def _most_likely(count: int, beams: _Beams, logits_RV: Float[Array, "R V"]) -> _Candidates:
    """Return the `count` best tokens of each row. Processors change the log-probabilities, as in transformers."""
    logprobs_RV = jax.nn.log_softmax(logits_RV.astype(jnp.float32), axis=-1)
    history = History(beams.history_RS, beams.seen_RV, beams.cache.length, beams.num_new)
    scores_RN, ids_RN = jax.lax.top_k(process_logits(logprobs_RV, beams.processors, history), count)
    return ids_RN, scores_RN, jnp.take_along_axis(logprobs_RV, ids_RN, axis=1)


def _on_host(candidates: _Candidates) -> Candidates:
    return Candidates(*map(np.asarray, candidates))


def _apply_decode(model: GPT2, params: Mapping[str, Any], ids: Array, cache: KVCache) -> tuple[Array, KVCache]:
    result: Any = model.apply({"params": params}, ids, cache, method="decode")
    return result


def _apply_head(model: GPT2, params: Mapping[str, Any], x: Array) -> Array:
    logits: Any = model.apply({"params": params}, x, method="head")
    return logits

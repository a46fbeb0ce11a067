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
from bridge import IGNORE_INDEX, GPT2Config
from bridge.evaluation import LabelScores
from bridge.generation.config import GenerationConfig
from bridge.generation.output import Candidates, Chunk, concatenate
from bridge.generation.processors import LogitsProcessors
from bridge.generation.prompts import Prompts, check_ids
from gpt2_jax.decoding.batch_invariance import SLOTS, BatchInvarianceError, SlotModel
from gpt2_jax.decoding.slots import decode_group, prefill_group
from gpt2_jax.decoding.state import State, add_token, first_state, next_token, prompt_history
from gpt2_jax.evaluation import label_scores
from gpt2_jax.logits_processors import History, on_device, process_logits
from gpt2_jax.model import GPT2, check_shape
from gpt2_jax.ops.kv_cache import KVCache, empty_cache

SMALLEST_BUCKET = 16
"""The smallest compiled cache length. Longer ones are powers of two, up to the model's positions."""

PREFILL_CHUNK = 256
"""Longer prompts run in chunks of this many tokens. One compilation serves any number of chunks."""


def generate(
    model: GPT2,
    params: Mapping[str, Any],
    input_ids: Int[Array, "B T"],
    generation_config: GenerationConfig | None = None,
    *,
    batch_invariant: bool = False,
    **overrides: Any,
) -> Int[Array, "B*num_return_sequences T+new"]:
    """Return each prompt followed by `max_new_tokens` new tokens.

    Rows that end early are filled with the first of `eos_token_ids`. Use `Decoder` for prompts of different lengths,
    for streaming, or for log-probabilities. A `Decoder` also prepares the parameters only once for many calls.

    Args:
        params: the model's parameters.
        input_ids: prompts of one length.
        generation_config: the configuration.
        batch_invariant: compute each row with the same bits in every batch; see `Decoder`.
        **overrides: fields of `bridge.GenerationConfig`, which replace those of `generation_config`. Without
            `generation_config`, `max_new_tokens` is required.

    Raises `ValueError` for an invalid configuration or for logits that are NaN or infinite, and `IndexError` for an id
    outside the vocabulary.
    """
    check_shape(input_ids)
    config = GenerationConfig.of(generation_config, overrides)
    prompts = np.asarray(input_ids)
    outputs = Decoder(model, params, batch_invariant=batch_invariant).generate(prompts.tolist(), config)
    return jnp.asarray(concatenate(prompts, outputs, config))


class _Beams(NamedTuple):
    """The state of beam search."""

    cache: KVCache
    history_RS: Int[Array, "R S"] | None
    seen_RV: Bool[Array, "R V"] | None
    processors: LogitsProcessors
    num_new: Int[Array, ""]


_Candidates = tuple[Int[Array, "R N"], Float[Array, "R N"], Float[Array, "R N"]]
"""`bridge.generation.output.Candidates` on the device."""


_Groups = tuple[tuple[State, int], ...]
"""The states and numbers of rows that are decoded together: all rows or, with `batch_invariant`, `SLOTS` at most."""


class Decoder(bridge.generation.decoder.Decoder[_Groups, _Beams]):
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
        batch_invariant: compute each row with the same bits in every batch, for every division of its tokens into
            prompt and new tokens, and in `token_logprobs`. Only on CPU with one thread (NPROC=1), without beam search,
            and slower.

    Raises `BatchInvarianceError` if `batch_invariant` is not possible here.
    """

    def __init__(
        self,
        model: GPT2,
        params: Mapping[str, Any],
        *,
        dtype: DTypeLike | None = None,
        batch_invariant: bool = False,
    ) -> None:
        self.config: GPT2Config = model.config
        self.model: GPT2 = model.clone(scan=False, dtype=model.dtype if dtype is None else jnp.dtype(dtype))
        # Moved to the device once; numpy arrays would be copied there in every call.
        params = jax.tree.map(jnp.asarray, params)
        self.params: Mapping[str, Any] = params if dtype is None and not model.scan else _prepare(model, dtype, params)
        self.slots: SlotModel | None = SlotModel(self.model, self.params) if batch_invariant else None

    def token_logprobs(self, rows: Prompts) -> list[Float[np.ndarray, " T-1"]]:
        """Return log p of each token but the first of each row, in nats. Needs `batch_invariant`.

        They have the same bits as the log-probabilities that `generate` returns for the same tokens. Raises the errors
        of `generate`, and `ValueError` for a row without tokens or with more than `n_positions`.
        """
        if self.slots is None:
            raise ValueError("token_logprobs needs a Decoder with batch_invariant=True; gpt2_jax.evaluate needs none")
        check_ids(self.config, rows)
        if not all(0 < len(row) <= self.config.n_positions for row in rows):
            raise ValueError(f"token_logprobs: a row must have 1 to n_positions={self.config.n_positions} tokens")
        return [self.slots.token_logprobs(row) for row in rows]

    def score_labels(self, ids: np.ndarray, labels: np.ndarray) -> LabelScores:
        if self.slots is not None:
            raise BatchInvarianceError("batch_invariant: use token_logprobs for the log-probabilities of given tokens")
        (B, T), P = ids.shape, self.config.n_positions
        missing = ((0, (1 << (B - 1).bit_length()) - B), (0, bucket(T, P) - T))  # to compile few shapes
        ids, labels = np.pad(ids, missing), np.pad(labels, missing, constant_values=IGNORE_INDEX)
        nats, ranks = label_scores(self.model, True, self.params, ids, labels)
        return LabelScores(np.asarray(nats)[:B, :T], np.asarray(ranks)[:B, :T])

    def _prefill(
        self,
        ids: np.ndarray,
        num_padding: np.ndarray,
        max_length: int,
        generation_config: GenerationConfig,
        noise: np.ndarray,
        ended: np.ndarray,
        copies: int,
    ) -> _Groups:
        if self.slots is not None:
            length, groups = bucket(max_length, self.config.n_positions), []
            ids, num_padding = np.repeat(ids, copies, axis=0), np.repeat(num_padding, copies)
            for first in range(0, len(ids), SLOTS):
                part = slice(first, first + SLOTS)
                rows = ids[part], num_padding[part], noise[part], ended[part]
                groups.append((prefill_group(self.slots, *rows, length, generation_config), len(ids[part])))
            return tuple(groups)
        cache, logits_RV = self._prefill_cache(ids, num_padding, max_length)
        if copies > 1:
            cache, logits_RV = _repeat_rows(copies, cache, logits_RV)
        vocab_size = self.config.vocab_size
        state = first_state(cache, ids, vocab_size, generation_config, noise, ended, copies)
        return ((next_token(state, logits_RV), len(noise)),)

    def _decode(self, groups: _Groups, steps: int) -> _Groups:
        if self.slots is not None:
            return tuple((decode_group(self.slots, state, steps), rows) for state, rows in groups)
        return tuple((_decode_loop(self.model, self.params, state, steps), rows) for state, rows in groups)

    def _chunk(self, groups: _Groups, first: int, count: int) -> Chunk:
        new = slice(first, first + count)
        ids = [np.asarray(state.ids_RN)[:rows, new] for state, rows in groups]
        logprobs = [
            np.asarray(state.logprobs_RN)[:rows, new] for state, rows in groups if state.logprobs_RN is not None
        ]
        return Chunk(np.concatenate(ids), np.concatenate(logprobs) if logprobs else None)

    def prefill_beams(
        self, ids: np.ndarray, num_padding: np.ndarray, max_length: int, config: GenerationConfig, num_candidates: int
    ) -> tuple[_Beams, Candidates]:
        if self.slots is not None:
            raise BatchInvarianceError("batch_invariant does not support beam search; set num_beams=1")
        cache, logits_RV = _repeat_rows(config.num_beams, *self._prefill_cache(ids, num_padding, max_length))
        processors = on_device(config, self.config.vocab_size)
        history, seen = prompt_history(
            processors, ids, num_padding, self.config.vocab_size, cache.max_length, config.num_beams
        )
        beams = _Beams(cache, history, seen, processors, jnp.zeros((), jnp.int32))
        return beams, _on_host(_most_likely(num_candidates, beams, logits_RV))

    def decode_beams(
        self, beams: _Beams, parents: np.ndarray, tokens: np.ndarray, num_candidates: int
    ) -> tuple[_Beams, Candidates]:
        beams, candidates = _decode_beams(self.model, num_candidates, self.params, beams, parents, tokens)
        return beams, _on_host(candidates)

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


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode_loop(model: GPT2, params: Mapping[str, Any], state: State, steps: int) -> State:
    """Select `steps` more tokens in each row, or fewer if all rows end earlier."""
    end = state.num_new + steps

    def is_unfinished(state: State) -> Bool[Array, ""]:
        return (state.num_new < end) & ~state.ended_R.all()

    def step(state: State) -> State:
        last_R1 = jax.lax.dynamic_slice_in_dim(state.ids_RN, state.num_new - 1, 1, axis=1)
        x_RTD, cache = _apply_decode(model, params, jnp.maximum(last_R1, 0), state.cache)
        return add_token(state._replace(cache=cache), _apply_head(model, params, x_RTD[:, 0]))

    return jax.lax.while_loop(is_unfinished, step, state)


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

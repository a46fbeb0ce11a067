"""The state of the loop over tokens, and the selection of one token in each row."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bridge.generation.config import GenerationConfig
from bridge.generation.output import ENDED, INVALID
from bridge.generation.processors import LogitsProcessors, padded_ids, seen_tokens
from gpt2_jax.logits_processors import History, on_device, process_logits
from gpt2_jax.ops.kv_cache import KVCache
from gpt2_jax.sampling import select_token


class State(NamedTuple):
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


def first_state(
    cache: KVCache,
    ids: Int[np.ndarray, "B T"],
    vocab_size: int,
    config: GenerationConfig,
    noise: Float[np.ndarray, "B*copies N"],
    ended: Bool[np.ndarray, " B*copies"],
    copies: int = 1,
) -> State:
    """Return the state before the first new token.

    Args:
        cache: the keys and values of the prompts, with `copies` rows of each.
        ids: the left-padded prompts.
        noise: a number from [0, 1) for each new token.
        ended: rows that get no tokens.
    """
    R, S = noise.shape[0], cache.max_length
    processors = on_device(config, vocab_size)
    num_padding = np.asarray(cache.num_padding)[::copies]
    history, seen = prompt_history(processors, ids, num_padding, vocab_size, S, copies)
    return State(
        cache=cache,
        ids_RN=jnp.full((R, S), ENDED, jnp.int32),
        logprobs_RN=jnp.zeros((R, S), jnp.float32) if config.logprobs else None,
        noise_RN=jnp.asarray(np.pad(noise, ((0, 0), (0, S - noise.shape[1])))),
        history_RS=history,
        seen_RV=seen,
        ended_R=jnp.asarray(ended),
        eos_token_ids=jnp.asarray(config.eos_token_ids, jnp.int32),
        processors=processors,
        num_new=jnp.zeros((), jnp.int32),
    )


def prompt_history(
    processors: LogitsProcessors,
    ids: Int[np.ndarray, "B T"],
    num_padding: Int[np.ndarray, " B"],
    vocab_size: int,
    max_length: int,
    copies: int,
) -> tuple[Array | None, Array | None]:
    """Return what the processors need of the prompts' tokens: `ids_RS` and `seen_RV` of a `History`."""
    history = padded_ids(ids, num_padding, max_length, copies)
    needs_seen = processors.repetition_penalty is not None
    seen = jnp.asarray(seen_tokens(history, vocab_size)) if needs_seen else None
    return jnp.asarray(history) if processors.needs_ids else None, seen


def add_token(state: State, logits_RV: Float[Array, "R V"], logprobs_RV: Float[Array, "R V"] | None = None) -> State:
    """Select one more token in each row that has not ended.

    Args:
        logprobs_RV: the log-softmax of the logits. By default, it is computed if the state needs it.
    """
    write, n = jax.lax.dynamic_update_slice_in_dim, state.num_new
    history = History(state.history_RS, state.seen_RV, state.cache.length, n)
    processed_RV = process_logits(logits_RV, state.processors, history)
    token_R = select_token(processed_RV, state.noise_RN[:, n], state.processors)
    logprobs_RN = state.logprobs_RN
    if logprobs_RN is not None:
        if logprobs_RV is None:
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


@functools.partial(jax.jit, donate_argnums=0)
def next_token(state: State, logits_RV: Float[Array, "R V"], logprobs_RV: Float[Array, "R V"] | None = None) -> State:
    """`add_token` as a program of its own."""
    return add_token(state, logits_RV, logprobs_RV)

"""Sampling from the port: one compiled loop that runs the whole sequence again for every token."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from bridge.sampling import GREEDY_BELOW, check_request
from gpt2_jax.model import GPT2, check_inputs

SHORTEST_BUCKET = 32


def generate(
    model: GPT2,
    params: Mapping[str, Any],
    input_ids: Int[Array, "B T"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Int[Array, "B T_plus_new"]:
    """The prompts, each followed by `max_new_tokens` sampled tokens.

    Args:
        temperature: logits are divided by it before sampling; 0 takes the likeliest token.
        top_k: sample among this many likeliest tokens only.
        seed: the same seed gives the same tokens.

    Raises `ValueError` for a request that cannot be honoured (`bridge.sampling`), and `IndexError`
    for an id outside the vocabulary. Compiles once per power of two of the total length.
    """
    check_inputs(model.config, input_ids)
    check_request(model.config, input_ids.shape[1], max_new_tokens, temperature, top_k, seed)
    input_ids = jnp.asarray(input_ids, jnp.int32)
    start, total = input_ids.shape[1], input_ids.shape[1] + max_new_tokens
    # What stands to the right of a position cannot change its logits, so the unfilled rest may be anything.
    length = min(max(SHORTEST_BUCKET, 1 << (total - 1).bit_length()), model.config.n_positions)
    ids_BT = jnp.pad(input_ids, ((0, 0), (0, length - start)))
    greedy, key = temperature < GREEDY_BELOW, jax.random.key(seed)
    ids_BT = _fill(model, greedy, top_k, params, ids_BT, start, total, temperature, key)
    return ids_BT[:, :total]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fill(
    model: GPT2,
    greedy: bool,
    top_k: int | None,
    params: Mapping[str, Any],
    ids_BT: Int[Array, "B T"],
    start: int,
    total: int,
    temperature: float,
    key: PRNGKeyArray,
) -> Int[Array, "B T"]:
    def add_token(n: Int[Array, ""], ids_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
        logits_BTV: Any = model.apply({"params": params}, ids_BT)
        logits_BV = logits_BTV[:, n - 1]
        if greedy:
            next_ids = logits_BV.argmax(axis=-1)
        else:
            next_ids = jax.random.categorical(jax.random.fold_in(key, n), _sharpened(logits_BV, temperature, top_k))
        return ids_BT.at[:, n].set(next_ids.astype(ids_BT.dtype))

    return jax.lax.fori_loop(start, total, add_token, ids_BT)


def _sharpened(logits_BV: Float[Array, "B V"], temperature: float, top_k: int | None) -> Float[Array, "B V"]:
    logits_BV = logits_BV.astype(jnp.float32) / temperature
    if top_k is None or top_k >= logits_BV.shape[-1]:
        return logits_BV
    least = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
    return jnp.where(logits_BV < least, -jnp.inf, logits_BV)

"""Causal attention in blocks of queries, each over the keys up to the block's end. The fast form on CPU.

Half of the scores are never computed, and none are saved for the backward pass, which recomputes each block's scores
from the logarithms of its row sums (Dao et al. 2022, "FlashAttention", algorithm 4, with blocks of queries only).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from gpt2_jax.ops.dtypes import wide_dtype
from gpt2_jax.ops.linear_call import linear_call
from gpt2_jax.parallel.remat import ATTENDED

BLOCK = 256
"""Queries in a block. At [1, 512] and [4, 1024] tokens of 12 heads, this is the fastest of 128, 256 and 512, or within
noise of the fastest."""


@jax.custom_jvp
def causal_attention_by_blocks(
    q_BHTK: Float[Array, "B H T K"],
    k_BHSK: Float[Array, "B H S K"],
    v_BHSK: Float[Array, "B H S K"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B H T K"]:
    """Return softmax(q k^T) v with a causal mask and S = T. Scores are in at least float32.

    With `segment_ids`, a query attends only to the keys with its own id.
    """
    return _forward(q_BHTK, k_BHSK, v_BHSK, segment_ids)[0]


def _forward(q: Array, k: Array, v: Array, segment_ids: Array | None) -> tuple[Array, tuple[Array | None, ...]]:
    contexts, log_sums = [], []
    for begin, end in _blocks(q.shape[2]):
        scores = jnp.einsum("BHTK,BHSK->BHTS", q[:, :, begin:end], k[:, :, :end], preferred_element_type=wide_dtype(q))
        scores = jnp.where(_visible(begin, end, segment_ids), scores, -jnp.inf)
        largest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        sums = weights.sum(-1, keepdims=True)
        context = jnp.einsum(
            "BHTS,BHSK->BHTK", weights.astype(v.dtype), v[:, :, :end], preferred_element_type=wide_dtype(q)
        )
        contexts.append((context / sums).astype(v.dtype))
        log_sums.append((largest + jnp.log(sums))[..., 0])
    context, log_sums = (checkpoint_name(jnp.concatenate(parts, 2), ATTENDED) for parts in (contexts, log_sums))
    return context, (q, k, v, segment_ids, context, log_sums)


@causal_attention_by_blocks.defjvp
def _jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    context, residuals = _forward(*primals)
    return context, linear_call(_tangent, _backward, residuals, tangents[:3], context)


def _tangent(residuals: tuple[Any, ...], tangents: tuple[Array, Array, Array]) -> Array:
    q, k, v, segment_ids, _, _ = residuals
    return jax.jvp(lambda q, k, v: _forward(q, k, v, segment_ids)[0], (q, k, v), tangents)[1]


def _backward(residuals: tuple[Any, ...], d_context: Array) -> tuple[Array, Array, Array]:
    q, k, v, segment_ids, context, log_sums = residuals
    wide = wide_dtype(q)
    # The scores have keys before queries, because XLA on CPU takes three times as long for products that sum over the
    # first axis of the scores.
    projection = jnp.einsum("BHTK,BHTK->BHT", d_context, context, preferred_element_type=wide)
    d_k, d_v, d_queries = jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide), []
    for begin, end in _blocks(q.shape[2]):
        rows = slice(begin, end)
        q_block, d_block, keys, values = q[:, :, rows], d_context[:, :, rows], k[:, :, :end], v[:, :, :end]
        scores = jnp.einsum("BHSK,BHTK->BHST", keys, q_block, preferred_element_type=wide)
        visible = _visible(begin, end, segment_ids, keys_first=True)
        # Masked before the exponential, which could overflow: infinity times 0 is NaN.
        weights = jnp.exp(jnp.where(visible, scores - log_sums[:, :, None, rows], -jnp.inf))
        d_weights = jnp.einsum("BHSK,BHTK->BHST", values, d_block, preferred_element_type=wide)
        d_scores = (weights * (d_weights - projection[:, :, None, rows])).astype(q.dtype)
        d_v = d_v.at[:, :, :end].add(
            jnp.einsum("BHST,BHTK->BHSK", weights.astype(v.dtype), d_block, preferred_element_type=wide)
        )
        d_k = d_k.at[:, :, :end].add(jnp.einsum("BHST,BHTK->BHSK", d_scores, q_block, preferred_element_type=wide))
        d_queries.append(jnp.einsum("BHSK,BHST->BHKT", keys, d_scores))
    return jnp.concatenate(d_queries, 3).swapaxes(2, 3), d_k.astype(k.dtype), d_v.astype(v.dtype)


def _visible(
    begin: int, end: int, segment_ids: Int[Array, "B T"] | None, *, keys_first: bool = False
) -> Bool[Array, "..."]:
    """Return which keys before `end` the queries begin ... end - 1 attend to: [T, S], or with segments [B, 1, T, S].

    `keys_first` exchanges the axes T and S.
    """
    query_axis, key_axis = (-1, -2) if keys_first else (-2, -1)
    index_T, index_S = jnp.arange(begin, end), jnp.arange(end)
    visible = jnp.expand_dims(index_S, query_axis) <= jnp.expand_dims(index_T, key_axis)
    if segment_ids is None:
        return visible
    of_queries, of_keys = segment_ids[:, None, begin:end], segment_ids[:, None, :end]
    return visible & (jnp.expand_dims(of_keys, query_axis) == jnp.expand_dims(of_queries, key_axis))


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + BLOCK, length)) for begin in range(0, max(1, length), BLOCK))

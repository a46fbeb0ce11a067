"""Causal attention by blocks of queries, each over the keys before its end alone: what CPUs run fast.

Half of the scores are never made, and none is kept for the backward pass, which makes each block's again from the
logarithm of its row sums (Dao et al. 2022, "FlashAttention", algorithm 4, with blocks of queries alone).
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from gpt2_jax.ops.functions import wide_dtype
from gpt2_jax.parallel.remat import ATTENDED

BLOCK = 256
"""Queries in a block. Of 128, 256 and 512, at [1, 512] and [4, 1024] tokens of 12 heads, the fastest or within the
noise of it."""


@jax.custom_vjp
def causal_attention_by_blocks(
    q_BHTK: Float[Array, "B H T K"], k_BHSK: Float[Array, "B H S K"], v_BHSK: Float[Array, "B H S K"]
) -> Float[Array, "B H T K"]:
    """softmax(q k^T) v, each query over the keys up to its own, with S = T; scores in float32 at least."""
    return _forward(q_BHTK, k_BHSK, v_BHSK)[0]


def _forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
    contexts, log_sums = [], []
    for begin, end in _blocks(q.shape[2]):
        scores = jnp.einsum("BHTK,BHSK->BHTS", q[:, :, begin:end], k[:, :, :end], preferred_element_type=wide_dtype(q))
        scores = jnp.where(jnp.arange(end) <= jnp.arange(begin, end)[:, None], scores, -jnp.inf)
        largest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        sums = weights.sum(-1, keepdims=True)
        context = jnp.einsum(
            "BHTS,BHSK->BHTK", weights.astype(v.dtype), v[:, :, :end], preferred_element_type=wide_dtype(q)
        )
        contexts.append((context / sums).astype(v.dtype))
        log_sums.append((largest + jnp.log(sums))[..., 0])
    context, log_sums = (checkpoint_name(jnp.concatenate(parts, 2), ATTENDED) for parts in (contexts, log_sums))
    return context, (q, k, v, context, log_sums)


def _backward(kept: tuple[Array, ...], d_context: Array) -> tuple[Array, Array, Array]:
    q, k, v, context, log_sums = kept
    wide = wide_dtype(q)
    # Keys before queries: so the products with the scores are of the one kind that XLA on CPU runs at speed (it takes
    # three times as long where the scores' first axis is summed over).
    along = jnp.einsum("BHTK,BHTK->BHT", d_context, context, preferred_element_type=wide)
    d_k, d_v, d_queries = jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide), []
    for begin, end in _blocks(q.shape[2]):
        rows = slice(begin, end)
        q_block, d_block, keys, values = q[:, :, rows], d_context[:, :, rows], k[:, :, :end], v[:, :, :end]
        scores = jnp.einsum("BHSK,BHTK->BHST", keys, q_block, preferred_element_type=wide)
        visible = jnp.arange(end)[:, None] <= jnp.arange(begin, end)
        # Hidden before the exponential: there it could be infinite, whose derivative times 0 is NaN.
        weights = jnp.exp(jnp.where(visible, scores - log_sums[:, :, None, rows], -jnp.inf))
        d_weights = jnp.einsum("BHSK,BHTK->BHST", values, d_block, preferred_element_type=wide)
        d_scores = (weights * (d_weights - along[:, :, None, rows])).astype(q.dtype)
        d_v = d_v.at[:, :, :end].add(
            jnp.einsum("BHST,BHTK->BHSK", weights.astype(v.dtype), d_block, preferred_element_type=wide)
        )
        d_k = d_k.at[:, :, :end].add(jnp.einsum("BHST,BHTK->BHSK", d_scores, q_block, preferred_element_type=wide))
        d_queries.append(jnp.einsum("BHSK,BHST->BHKT", keys, d_scores))
    return jnp.concatenate(d_queries, 3).swapaxes(2, 3), d_k.astype(k.dtype), d_v.astype(v.dtype)


causal_attention_by_blocks.defvjp(_forward, _backward)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + BLOCK, length)) for begin in range(0, max(1, length), BLOCK))

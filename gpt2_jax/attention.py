"""Attention between the heads' queries, keys and values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray


def attention(
    q_BTHK: Float[Array, "B T H K"],
    k_BSHK: Float[Array, "B S H K"],
    v_BSHK: Float[Array, "B S H K"],
    mask: Bool[Array, "#B #H #T S"] | None,
    *,
    is_causal: bool,
    scale: float | Float[Array, ""],
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, "B T H K"]:
    """softmax(scale q k^T) v, each query over the keys it may see.

    Scores and softmax are in float32 at least, whatever the dtype of q, k and v; products of
    bfloat16 are exact there, so this is what `reorder_and_upcast_attn` asks for, with or without it.
    """
    T, S, dtype = q_BTHK.shape[1], k_BSHK.shape[1], v_BSHK.dtype
    if is_causal and T != S:
        raise ValueError(f"causal attention needs as many queries as keys, not {T} and {S}; pass a mask instead")
    wide = jnp.promote_types(dtype, jnp.float32)
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK, preferred_element_type=wide)
    if is_causal:
        causal = jnp.tril(jnp.ones((T, S), bool))
        mask = causal if mask is None else mask & causal
    weights_BHTS = _weights(scores_BHTS, mask, scale)
    if dropout_rate > 0.0:
        if dropout_key is None:
            raise ValueError('attention dropout needs a key: pass rngs={"dropout": key} to apply')
        kept = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, weights_BHTS.shape)
        weights_BHTS = jnp.where(kept, weights_BHTS / (1.0 - dropout_rate), 0.0)
    return jnp.einsum("BHTS,BSHK->BTHK", weights_BHTS.astype(dtype), v_BSHK)


def cached_attention(
    q_BTHK: Float[Array, "B T H K"],
    k_NKS: Float[Array, "N K S"],
    v_NSK: Float[Array, "N S K"],
    mask: Bool[Array, "#B #H #T S"],
    *,
    scale: float | Float[Array, ""],
) -> Float[Array, "B T H K"]:
    """As `attention`, with keys and values as a cache has them: N = B H, each head's in one piece."""
    (B, T, H, K), dtype = q_BTHK.shape, v_NSK.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    q_NTK = q_BTHK.swapaxes(1, 2).reshape(B * H, T, K)
    scores_NTS = jnp.einsum("NTK,NKS->NTS", q_NTK, k_NKS, preferred_element_type=wide)
    weights_BHTS = _weights(scores_NTS.reshape(B, H, T, -1), mask, scale)
    context_NTK = jnp.einsum("NTS,NSK->NTK", weights_BHTS.reshape(B * H, T, -1).astype(dtype), v_NSK)
    return context_NTK.reshape(B, H, T, K).swapaxes(1, 2)


def _weights(
    scores_BHTS: Float[Array, "B H T S"], mask: Bool[Array, "#B #H #T S"] | None, scale: float | Float[Array, ""]
) -> Float[Array, "B H T S"]:
    dtype = scores_BHTS.dtype
    scores_BHTS = scores_BHTS * jnp.asarray(scale, dtype)
    if mask is not None:
        # The most negative number and not -inf: a row of -inf would be NaN after softmax.
        scores_BHTS = jnp.where(mask, scores_BHTS, jnp.finfo(dtype).min)
    return jax.nn.softmax(scores_BHTS, axis=-1)

"""Attention of single tokens to a key/value cache, in an order of operations that does not depend on other tokens.

The tokens are in *slots*: any tokens of any rows of the cache. A loop computes one slot after another, and the keys of
a slot in blocks of a fixed length, so every product and every sum has a fixed shape. A row's position p is at index p
of the cache, without padding. Blocks after the token are not computed. The softmax is the online softmax of Dao et al.
2022, "FlashAttention".
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gpt2_jax.ops.dtypes import wide_dtype

KEY_BLOCK = 128
"""Keys in a block. The length of the cache must be a multiple."""


class Slots(NamedTuple):
    """Where the token of each of M slots is. Only the first `used` slots have one."""

    row_M: Int[np.ndarray, " M"] | Int[Array, " M"]
    position_M: Int[np.ndarray, " M"] | Int[Array, " M"]
    used: int | Int[Array, ""]


def append_slots(
    keys_NKS: Float[Array, "N K S"],
    values_NSK: Float[Array, "N S K"],
    k_MHK: Float[Array, "M H K"],
    v_MHK: Float[Array, "M H K"],
    slots: Slots,
) -> tuple[Float[Array, "N K S"], Float[Array, "N S K"]]:
    """Write the keys and values of the slots to one layer of a `KVCache`."""
    H, write = k_MHK.shape[1], jax.lax.dynamic_update_slice

    def append(i: Int[Array, ""], cache: tuple[Array, Array]) -> tuple[Array, Array]:
        (keys_NKS, values_NSK), n, s = cache, slots.row_M[i] * H, slots.position_M[i]
        keys_NKS = write(keys_NKS, k_MHK[i][:, :, None].astype(keys_NKS.dtype), (n, 0, s))
        return keys_NKS, write(values_NSK, v_MHK[i][:, None].astype(values_NSK.dtype), (n, s, 0))

    return jax.lax.fori_loop(0, slots.used, append, (keys_NKS, values_NSK))


def slot_attention(
    q_MHK: Float[Array, "M H K"],
    keys_NKS: Float[Array, "N K S"],
    values_NSK: Float[Array, "N S K"],
    slots: Slots,
    *,
    scale: float | Float[Array, ""],
) -> Float[Array, "M H K"]:
    """Attend from each slot to the keys of its row up to its own position. Unused slots get zeros."""
    H = q_MHK.shape[1]

    def attend(i: Int[Array, ""], context_MHK: Array) -> Array:
        found_HK = _attend(q_MHK[i], keys_NKS, values_NSK, slots.row_M[i] * H, slots.position_M[i], scale)
        return context_MHK.at[i].set(found_HK)

    return jax.lax.fori_loop(0, slots.used, attend, jnp.zeros(q_MHK.shape, values_NSK.dtype))


def _attend(
    q_HK: Array, keys_NKS: Array, values_NSK: Array, first: Array, position: Array, scale: float | Array
) -> Float[Array, "H K"]:
    (H, K), wide, read = q_HK.shape, wide_dtype(values_NSK), jax.lax.dynamic_slice
    lowest = jnp.finfo(wide).min

    def add_block(b: Int[Array, ""], sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        (largest_H, total_H, context_HK), start = sums, b * KEY_BLOCK
        k_HKS = read(keys_NKS, (first, 0, start), (H, K, KEY_BLOCK))
        v_HSK = read(values_NSK, (first, start, 0), (H, KEY_BLOCK, K))
        scores_HS = jnp.einsum("HK,HKS->HS", q_HK, k_HKS, preferred_element_type=wide) * jnp.asarray(scale, wide)
        scores_HS = jnp.where(start + jnp.arange(KEY_BLOCK) <= position, scores_HS, lowest)
        new_H = jnp.maximum(largest_H, scores_HS.max(-1))
        weights_HS, decay_H = jnp.exp(scores_HS - new_H[:, None]), jnp.exp(largest_H - new_H)
        added_HK = jnp.einsum("HS,HSK->HK", weights_HS.astype(v_HSK.dtype), v_HSK, preferred_element_type=wide)
        return new_H, total_H * decay_H + weights_HS.sum(-1), context_HK * decay_H[:, None] + added_HK

    sums = jnp.full(H, lowest, wide), jnp.zeros(H, wide), jnp.zeros((H, K), wide)
    _, total_H, context_HK = jax.lax.fori_loop(0, position // KEY_BLOCK + 1, add_block, sums)
    return (context_HK / total_H[:, None]).astype(values_NSK.dtype)

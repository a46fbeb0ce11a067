"""The keys and values of the tokens so far, so that decoding runs each token only once."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from bridge import GPT2Config


class KVCache(NamedTuple):
    """A preallocated cache. `GPT2.decode` takes one and returns the updated one.

    Rows are left-padded: each row's tokens end at position `length - 1`. S is the maximum length, and N = B H: rows and
    heads share one axis, as in the batched products that read the cache. XLA then updates the cache in place; with two
    axes, it copies the cache twice for every token.
    """

    keys: tuple[Float[Array, "N K S"], ...]
    """One array per layer."""
    values: tuple[Float[Array, "N S K"], ...]
    num_padding: Int[Array, " B"]
    """The number of padding positions at the start of each row."""
    length: Int[Array, ""]
    """The number of positions in use, padding included. `GPT2.decode` writes to the positions after them."""
    is_token: Bool[Array, "B S"] | None = None
    """Whether each position has a token, if `GPT2.decode` was given a mask. Otherwise all after `num_padding` do."""

    @property
    def max_length(self) -> int:
        return self.values[0].shape[1]

    def select_rows(self, rows: Int[Array, " R"]) -> KVCache:
        """Return a copy with these rows. A row may occur more than once."""
        B = self.num_padding.shape[0]

        def selected(array: Array) -> Array:
            return array.reshape(B, -1, *array.shape[1:])[rows].reshape(-1, *array.shape[1:])

        keys, values = (tuple(map(selected, arrays)) for arrays in (self.keys, self.values))
        is_token = None if self.is_token is None else self.is_token[rows]
        return KVCache(keys, values, self.num_padding[rows], self.length, is_token)


def empty_cache(config: GPT2Config, num_padding: Int[Array, " B"], max_length: int, dtype: DTypeLike) -> KVCache:
    """Return a cache for `max_length` positions in each row, padding included."""
    B, H, K, L = num_padding.shape[0], config.n_head, config.head_size, config.n_layer
    keys = tuple(jnp.zeros((B * H, K, max_length), dtype) for _ in range(L))
    values = tuple(jnp.zeros((B * H, max_length, K), dtype) for _ in range(L))
    return KVCache(keys, values, num_padding, jnp.zeros((), jnp.int32))


def append(
    keys_NKS: Float[Array, "N K S"],
    values_NSK: Float[Array, "N S K"],
    k_BTHK: Float[Array, "B T H K"],
    v_BTHK: Float[Array, "B T H K"],
    length: Int[Array, ""],
) -> tuple[Float[Array, "N K S"], Float[Array, "N S K"]]:
    """Write the keys and values of T more tokens of one layer to the positions after `length`."""
    (B, T, H, K), write = k_BTHK.shape, jax.lax.dynamic_update_slice_in_dim
    k_NKT = k_BTHK.transpose(0, 2, 3, 1).reshape(B * H, K, T)
    v_NTK = v_BTHK.transpose(0, 2, 1, 3).reshape(B * H, T, K)
    keys_NKS = write(keys_NKS, k_NKT.astype(keys_NKS.dtype), length, axis=2)
    values_NSK = write(values_NSK, v_NTK.astype(values_NSK.dtype), length, axis=1)
    return keys_NKS, values_NSK


def new_positions(
    cache: KVCache, num_new: int, attention_mask: Int[Array, "B T"] | None
) -> tuple[Int[Array, "B T"], Bool[Array, "B T S"], Bool[Array, "B S"] | None]:
    """Return the rows of `wpe` for T more positions, the keys that they attend to, and the new `is_token`."""
    index_T, index_S = cache.length + jnp.arange(num_new), jnp.arange(cache.max_length)
    padding_B1 = cache.num_padding[:, None]
    causal_TS, is_token_BS = index_S <= index_T[:, None], cache.is_token
    if attention_mask is None and is_token_BS is None:
        return jnp.clip(index_T - padding_B1, min=0), causal_TS & (index_S >= padding_B1[..., None]), None
    if is_token_BS is None:
        is_token_BS = index_S >= padding_B1
    if attention_mask is None:
        attention_mask = jnp.ones((len(padding_B1), num_new), bool)
    num_before_B1 = (is_token_BS & (index_S < cache.length)).sum(1, keepdims=True, dtype=jnp.int32)
    new_BT = attention_mask.astype(bool)
    is_token_BS = jax.lax.dynamic_update_slice_in_dim(is_token_BS, new_BT, cache.length, axis=1)
    positions_BT = jnp.clip(num_before_B1 + jnp.cumsum(new_BT, axis=1, dtype=jnp.int32) - 1, min=0)
    return positions_BT, causal_TS & is_token_BS[:, None], is_token_BS

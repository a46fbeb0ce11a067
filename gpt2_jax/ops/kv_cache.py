"""The keys and values of the tokens so far, so that decoding runs each token only once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

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

    @property
    def max_length(self) -> int:
        return self.values[0].shape[1]

    def change_rows(self, change: Callable[[Array], Array]) -> KVCache:
        """Return the cache with its rows reordered, repeated or removed. `change` maps B rows to the new rows."""
        B = self.num_padding.shape[0]

        def changed(array: Array) -> Array:
            return change(array.reshape(B, -1, *array.shape[1:])).reshape(-1, *array.shape[1:])

        keys, values = (tuple(map(changed, arrays)) for arrays in (self.keys, self.values))
        return KVCache(keys, values, change(self.num_padding), self.length)


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

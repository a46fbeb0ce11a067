"""The keys and values of the tokens so far, so that decoding runs each token only once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridge import GPT2Config


@dataclass
class KVCache:
    """A preallocated cache. `GPT2.decode` writes into it.

    Rows are left-padded: each row's tokens end at position `length - 1`. S is the maximum length.
    """

    keys: list[Float[Tensor, "B H S K"]]
    """One tensor per layer."""
    values: list[Float[Tensor, "B H S K"]]
    num_padding: Int[Tensor, " B"]
    """The number of padding positions at the start of each row."""
    length: int = 0
    """The number of positions in use, padding included. `GPT2.decode` writes to the positions after them."""

    def select_rows(self, rows: Int[Tensor, " R"]) -> KVCache:
        """Return a copy with these rows. A row may occur more than once."""
        keys, values = ([tensor[rows] for tensor in tensors] for tensors in (self.keys, self.values))
        return KVCache(keys, values, self.num_padding[rows], self.length)


def empty_cache(config: GPT2Config, num_padding: Int[Tensor, " B"], max_length: int, dtype: torch.dtype) -> KVCache:
    """Return a cache for `max_length` positions in each row, padding included."""
    B, H, K, L = num_padding.shape[0], config.n_head, config.head_size, config.n_layer
    keys, values = (
        [torch.zeros(B, H, max_length, K, dtype=dtype, device=num_padding.device) for _ in range(L)] for _ in range(2)
    )
    return KVCache(keys, values, num_padding)

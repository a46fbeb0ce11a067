"""The keys and values of the tokens so far, so that decoding runs each token only once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
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
    is_token: Bool[Tensor, "B S"] | None = None
    """Whether each position has a token, if `GPT2.decode` was given a mask. Otherwise all after `num_padding` do."""

    @property
    def max_length(self) -> int:
        return self.values[0].shape[2]

    def select_rows(self, rows: Int[Tensor, " R"]) -> KVCache:
        """Return a copy with these rows. A row may occur more than once."""
        keys, values = ([tensor[rows] for tensor in tensors] for tensors in (self.keys, self.values))
        is_token = None if self.is_token is None else self.is_token[rows]
        return KVCache(keys, values, self.num_padding[rows], self.length, is_token)


def empty_cache(config: GPT2Config, num_padding: Int[Tensor, " B"], max_length: int, dtype: torch.dtype) -> KVCache:
    """Return a cache for `max_length` positions in each row, padding included."""
    B, H, K, L = num_padding.shape[0], config.n_head, config.head_size, config.n_layer
    keys, values = (
        [torch.zeros(B, H, max_length, K, dtype=dtype, device=num_padding.device) for _ in range(L)] for _ in range(2)
    )
    return KVCache(keys, values, num_padding)


def new_positions(
    cache: KVCache, num_new: int, attention_mask: Int[Tensor, "B T"] | None
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T length+T"], Bool[Tensor, "B S"] | None]:
    """Return the rows of `wpe` for T more positions, the keys that they attend to, and the new `is_token`."""
    end, padding_B1 = cache.length + num_new, cache.num_padding[:, None]
    index_T = torch.arange(cache.length, end, device=padding_B1.device)
    index_S = torch.arange(end, device=padding_B1.device)
    causal_TS, is_token_BS = index_S <= index_T[:, None], cache.is_token
    if attention_mask is None and is_token_BS is None:
        return (index_T - padding_B1).clamp(min=0), causal_TS & (index_S >= padding_B1[..., None]), None
    if is_token_BS is None:
        is_token_BS = torch.arange(cache.max_length, device=padding_B1.device) >= padding_B1
    if attention_mask is None:
        attention_mask = padding_B1.new_ones(len(padding_B1), num_new)
    new_BT = attention_mask.bool()
    is_token_BS = torch.cat((is_token_BS[:, : cache.length], new_BT, is_token_BS[:, end:]), dim=1)
    num_before_B1 = is_token_BS[:, : cache.length].sum(1, keepdim=True)
    positions_BT = (num_before_B1 + new_BT.cumsum(1) - 1).clamp(min=0)
    return positions_BT, causal_TS & is_token_BS[:, None, :end], is_token_BS

"""Padding of inputs, for the check that padding changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gpt2_jax.parity.pairs.sides.side import Inputs

Unpad = Callable[[np.ndarray], np.ndarray]
Pad = Callable[[Inputs], tuple[Inputs, Unpad]]
"""Returns padded inputs, and a function that removes the padding from an output."""


def pad_tokens(side: str, *, by: int = 3, ids: int = 0, mask: int = 1, pad_token_id: int = 0) -> Pad:
    """Pad token ids and their mask, both [B, T], for a model with outputs [B, T, ...].

    Args:
        side: "left" or "right".
        by: the number of padding tokens.
        ids: the position of the ids in the inputs.
        mask: the position of the mask, which is 1 at tokens and 0 at padding.
        pad_token_id: the id of padding.
    """
    widths = ((0, 0), (by, 0) if side == "left" else (0, by))

    def pad(inputs: Inputs) -> tuple[Inputs, Unpad]:
        padded = list(inputs)
        padded[ids] = np.pad(inputs[ids], widths, constant_values=pad_token_id)
        padded[mask] = np.pad(inputs[mask], widths, constant_values=0)
        length = inputs[ids].shape[1]
        return tuple(padded), lambda output: output[:, by:] if side == "left" else output[:, :length]

    return pad

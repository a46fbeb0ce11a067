"""Prompts: lists of token ids of different lengths, and their padding to one array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from bridge.config import GPT2Config

Prompts = Sequence[Sequence[int]]


def left_padded(rows: Prompts) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Return the rows as one left-padded array, and the number of padding ids in each row."""
    longest = max(map(len, rows))
    ids = np.zeros((len(rows), longest), np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[longest - len(tokens) :] = tokens
    return ids, np.array([longest - len(row) for row in rows], np.int32)


def check_ids(config: GPT2Config, prompts: Prompts) -> None:
    """Raise `IndexError` for ids outside the vocabulary."""
    ids = [i for prompt in prompts for i in prompt]
    if ids and not 0 <= min(ids) <= max(ids) < config.vocab_size:
        raise IndexError(f"token ids from {min(ids)} to {max(ids)}; the vocabulary is 0 to {config.vocab_size - 1}")

"""Resizing of the vocabulary: the rows of the token embedding and of an untied head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from bridge.checkpoint import Checkpoint
from bridge.config import GPT2Config
from bridge.errors import ConversionError, bullet_list, quoted
from bridge.parameter_table import VOCABULARY_ROWS
from bridge.storage.dtypes import FLOAT_DTYPES
from bridge.storage.tensors import LazyTensor, LazyTensorMap


def resize_vocabulary(
    checkpoint: Checkpoint, rows: int, new_rows: np.ndarray | Mapping[str, np.ndarray] | None = None
) -> Checkpoint:
    """Return the model with `rows` tokens, for example after tokens were added to its tokenizer.

    Existing rows keep every bit. By default each new row is the mean of the existing ones, so a new token is at first
    about as likely as the average token. transformers' `resize_token_embeddings` draws the new rows at random around
    the same mean (Hewitt 2021). The tokenizer is not changed, and the optimizer state is dropped.

    If the vocabulary has padding, remove it first with `checkpoint.with_vocab_size`: padding rows would take part in
    the mean, and the new tokens need the ids after the last real one.

    >>> import bridge
    >>> resized = bridge.resize_vocabulary(bridge.load("bundled"), 1030)
    >>> resized.tensors["wte.weight"].shape[0], resized.config.vocab_size
    (1030, 1030)

    Args:
        checkpoint: the model.
        rows: the size of the new vocabulary. A smaller one removes the last rows.
        new_rows: the new rows `[N, D]`, cast to the model's dtype. If the head is untied, a mapping with the keys
            `wte.weight` and `lm_head.weight`; a missing key selects the mean.

    Raises:
        ConversionError: `rows` is below 1, or `new_rows` does not fit.
        ConfigError: `rows` exceeds the limit of `GPT2Config`.
    """
    added = rows - checkpoint.config.vocab_size
    given = _given(new_rows, added, checkpoint.config)
    if added <= 0:
        return checkpoint.with_vocab_size(rows)
    entries = checkpoint.tensors.entries
    resized = {name: _with_rows(entries[name], given.get(name), added) for name in sorted(VOCABULARY_ROWS & {*entries})}
    config = replace(checkpoint.config, vocab_size=rows)
    return replace(checkpoint, config=config, tensors=LazyTensorMap({**entries, **resized}), optimizer=None)


def _given(new_rows: Any, added: int, config: GPT2Config) -> Mapping[str, np.ndarray]:
    """Return canonical name -> new rows. Raises `ConversionError` unless they fit the model."""
    if new_rows is None:
        return {}
    if not isinstance(new_rows, Mapping):
        if not config.tie_word_embeddings:
            raise ConversionError(
                "the head is not tied to the token embedding; pass new_rows as a mapping with the keys wte.weight and "
                "lm_head.weight"
            )
        new_rows = {"wte.weight": new_rows}
    arrays = {name: np.asarray(array) for name, array in new_rows.items()}
    names = VOCABULARY_ROWS if not config.tie_word_embeddings else VOCABULARY_ROWS - {"lm_head.weight"}
    shape = (max(0, added), config.n_embd)
    problems = [f"{quoted(name)} is not one of {', '.join(sorted(names))}" for name in arrays if name not in names]
    problems += [
        f"{name} has shape {array.shape}; {shape[0]} new rows of {shape[1]} numbers are needed"
        for name, array in arrays.items()
        if name in names and array.shape != shape
    ]
    problems += [
        f"{quoted(name)} holds {array.dtype}, not floats"
        for name, array in arrays.items()
        if array.dtype not in FLOAT_DTYPES
    ]
    if problems:
        raise ConversionError("new_rows do not fit the model:\n" + bullet_list(problems))
    return arrays


def _with_rows(entry: LazyTensor, new_rows: np.ndarray | None, added: int) -> LazyTensor:
    """Append rows to a tensor: the given ones, or its mean. The tensor is read on access."""

    def read() -> np.ndarray:
        old_VD = entry.read()
        new = old_VD.mean(axis=0, dtype=np.float64) if new_rows is None else new_rows
        extended_VD = np.empty((len(old_VD) + added, *entry.shape[1:]), entry.dtype)
        extended_VD[: len(old_VD)] = old_VD
        extended_VD[len(old_VD) :] = new.astype(entry.dtype)
        return extended_VD

    return LazyTensor(entry.dtype, (entry.shape[0] + added, *entry.shape[1:]), read)

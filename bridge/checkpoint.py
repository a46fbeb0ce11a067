"""A checkpoint in this project's terms, whatever format it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bridge.config import GPT2Config
from bridge.conversion import canonicalize
from bridge.errors import ConversionError, NoTokenizerError
from bridge.optimizer_state import AdamWState
from bridge.parameter_table import VOCABULARY_ROWS, parameters
from bridge.storage.tensors import LazyTensor, LazyTensorMap, first_rows
from bridge.tokenizers.loading import load_tokenizer

if TYPE_CHECKING:
    import tiktoken


@dataclass(frozen=True)
class Checkpoint:
    """A GPT-2's configuration and weights, and what came along with them."""

    config: GPT2Config
    tensors: LazyTensorMap
    """Canonical name -> array, read anew at each look-up."""
    format: str
    """Name of the format it was read from, or "memory"."""
    path: Path | None = None
    """The directory it was read from, or that its file lies in, where its tokenizer is."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields of its `config.json` that do not change the mathematics, kept for a round trip."""
    diagnostics: tuple[str, ...] = ()
    """One sentence for each unusual property of the stored file and for each assumption of the reader."""
    optimizer: AdamWState | None = None
    """AdamW's moments, where the file has them; they are read as the tensors are."""
    progress: Mapping[str, Any] = field(default_factory=dict)
    """How far training had come, in the words of the file: nanoGPT's `iter_num`, `best_val_loss` and `config`."""
    own_tokenizer: Callable[[], tiktoken.Encoding] | None = None
    """Makes the tokenizer that is inside the file; None where it is in files beside it."""
    source: Path | None = None
    """The file or directory that `bridge.load` opened. Tensors are read from it lazily, so no writer may replace it."""

    @classmethod
    def of(cls, tensors: Mapping[str, Any], config: GPT2Config, like: Checkpoint | None = None) -> Checkpoint:
        """A checkpoint from arrays in memory; checks them as `bridge.canonicalize` does.

        `like`: where they came from, whose tokenizer and harmless fields go along.
        """
        made = cls(config, canonicalize(tensors, config), "memory")
        if like is None:
            return made
        return replace(made, path=like.path, extra=like.extra, own_tokenizer=like.own_tokenizer)

    def with_biases(self) -> Checkpoint:
        """The same function with `bias=True`: where there was no bias there is one of zeros, without an optimizer."""
        if self.config.bias:
            return self
        config = replace(self.config, bias=True)
        dtype = next(iter(self.tensors.entries.values())).dtype
        entries = {
            p.torch_name: self.tensors.entries.get(p.torch_name) or LazyTensor.of(np.zeros(p.torch_shape, dtype))
            for p in parameters(config)
        }
        return replace(self, config=config, tensors=LazyTensorMap(entries), optimizer=None)

    def with_activation(self, name: str) -> Checkpoint:
        """The same weights under another activation: another function, for a format that has only that one."""
        return replace(self, config=replace(self.config, activation_function=name))

    def with_vocab_size(self, rows: int) -> Checkpoint:
        """Without the rows that pad the vocabulary past `rows`, and without an optimizer.

        Raises `ConversionError` where there are not that many.
        """
        if not 1 <= rows <= self.config.vocab_size:
            raise ConversionError(f"the vocabulary has {self.config.vocab_size} rows; it cannot be cut to {rows}")
        if rows == self.config.vocab_size:
            return self
        cut = {name: first_rows(self.tensors.entries[name], rows) for name in VOCABULARY_ROWS & {*self.tensors}}
        config = replace(self.config, vocab_size=rows)
        return replace(self, config=config, tensors=LazyTensorMap({**self.tensors.entries, **cut}), optimizer=None)

    def tokenizer(self) -> tiktoken.Encoding:
        """The tokenizer that was saved with the weights; raises `TokenizerError` if there is none."""
        if self.own_tokenizer is not None:
            return self.own_tokenizer()
        if self.path is None:
            raise NoTokenizerError(
                "a checkpoint in memory has no tokenizer; load one from a directory that has its files"
            )
        return load_tokenizer(self.path, self.config.vocab_size)

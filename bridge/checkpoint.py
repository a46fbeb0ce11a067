"""A checkpoint, independent of the format that it was read from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bridge.config import GPT2Config
from bridge.conversion import canonicalize
from bridge.errors import ConversionError, NoTokenizerError
from bridge.optimizer_state import AdamWState
from bridge.parameter_table import VOCABULARY_ROWS, parameters
from bridge.storage.tensors import LazyTensor, LazyTensorMap, first_rows
from bridge.tokenizers.loading import load_tokenizer
from bridge.tokenizers.tokenizer import Tokenizer

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """The configuration and weights of a GPT-2, with its tokenizer and training state if they were saved."""

    config: GPT2Config
    tensors: LazyTensorMap
    """Canonical name -> array. An array is read again on each access."""
    format: str
    """Name of the format that it was read from, or "memory"."""
    path: Path | None = None
    """The directory that it was read from, or that contains its file. Its tokenizer is in this directory."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields of its `config.json` that do not affect the model's output, kept for a round trip."""
    diagnostics: tuple[str, ...] = ()
    """One sentence for each unusual property of the stored file and for each assumption of the reader."""
    optimizer: AdamWState | None = None
    """The state of AdamW, if the file has one. Like the tensors, it is read on access."""
    progress: Mapping[str, Any] = field(default_factory=dict)
    """Progress of the training, under the names in the file: nanoGPT's `iter_num`, `best_val_loss` and `config`."""
    own_tokenizer: Callable[[], Tokenizer] | None = None
    """Returns the tokenizer that the file contains. None if the tokenizer is in files beside it."""
    source: Path | None = None
    """The file or directory that `bridge.load` opened. For a run, it is the directory of its checkpoint. Tensors are
    read from it lazily, so no writer may replace it."""
    base_source: Path | None = None
    """The same for the base of an adapter, whose tensors are read lazily, too."""
    base_path: Path | None = None
    """For an adapter: the directory of its base, which has the generation settings."""

    @property
    def settings_path(self) -> Path | None:
        """The directory of `generation_config.json`. For an adapter, it may differ from that of the tokenizer."""
        return self.base_path or self.path

    @classmethod
    def of(cls, tensors: Mapping[str, Any], config: GPT2Config, like: Checkpoint | None = None) -> Checkpoint:
        """Make a checkpoint from arrays in memory.

        Args:
            tensors: name -> array, with names that `bridge.canonicalize` accepts.
            config: the configuration of the model.
            like: a checkpoint to copy the tokenizer, the generation settings and the `extra` fields from.

        Raises:
            ConversionError: the tensors are not those of the model.
        """
        checkpoint = cls(config, canonicalize(tensors, config), "memory")
        if like is None:
            return checkpoint
        return replace(
            checkpoint, path=like.path, extra=like.extra, own_tokenizer=like.own_tokenizer, base_path=like.base_path
        )

    def with_biases(self) -> Checkpoint:
        """Return an equivalent model with `bias=True`. Missing biases become zeros; the optimizer state is dropped."""
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
        """Return the same weights with another activation. This changes the model's output.

        Use it for target formats that support only one activation.
        """
        return replace(self, config=replace(self.config, activation_function=name))

    def with_vocab_size(self, rows: int) -> Checkpoint:
        """Return the first `rows` rows of the vocabulary, to remove padding. The optimizer state is dropped.

        Raises `ConversionError` if the vocabulary has fewer rows.
        """
        if not 1 <= rows <= self.config.vocab_size:
            raise ConversionError(f"the vocabulary has {self.config.vocab_size} rows; it cannot be reduced to {rows}")
        if rows == self.config.vocab_size:
            return self
        cut = {name: first_rows(self.tensors.entries[name], rows) for name in VOCABULARY_ROWS & {*self.tensors}}
        config = replace(self.config, vocab_size=rows)
        return replace(self, config=config, tensors=LazyTensorMap({**self.tensors.entries, **cut}), optimizer=None)

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that was saved with the weights.

        Raises:
            NoTokenizerError: the checkpoint has no tokenizer.
            TokenizerError: its files are damaged or of a kind that is not supported.
        """
        if self.own_tokenizer is not None:
            tokenizer = self.own_tokenizer()
        elif self.path is not None:
            name = self.extra.get("tokenizer_class")
            tokenizer = load_tokenizer(self.path, self.config.vocab_size, name, self.progress)
        else:
            raise NoTokenizerError(
                "a checkpoint in memory has no tokenizer; load the checkpoint from a directory with tokenizer files"
            )
        tokenizer.chat_directory = self.path
        return tokenizer

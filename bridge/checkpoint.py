"""A checkpoint in this project's terms, whatever format it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.arrays import LazyTensors
from bridge.config import GPT2Config
from bridge.errors import TokenizerError
from bridge.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import tiktoken


@dataclass(frozen=True)
class Checkpoint:
    """A GPT-2's configuration and weights, and what came along with them."""

    config: GPT2Config
    tensors: LazyTensors
    """Canonical name -> array, read anew at each look-up."""
    format: str
    """Name of the format it was read from, or "memory"."""
    path: Path | None = None
    """The directory it was read from."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields of its `config.json` that do not change the mathematics, kept for a round trip."""
    oddities: tuple[str, ...] = ()
    """What is unusual about how it was stored, a sentence each."""

    @classmethod
    def of(cls, tensors: Mapping[str, Any], config: GPT2Config) -> Checkpoint:
        """A checkpoint from arrays in memory; checks them as `bridge.canonicalize` does."""
        from bridge.convert import canonicalize

        return cls(config, canonicalize(tensors, config), format="memory")

    def tokenizer(self) -> tiktoken.Encoding:
        """The tokenizer that was saved with the weights; raises `TokenizerError` if there is none."""
        if self.path is None:
            raise TokenizerError(
                "a checkpoint in memory has no tokenizer; load one from a directory that has its files"
            )
        return load_tokenizer(self.path, self.config.vocab_size)

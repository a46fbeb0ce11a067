"""The comparison of everything in two checkpoints that needs no framework."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bridge.checkpoint import Checkpoint
from bridge.comparison.optimizer import OptimizerComparison, compare_optimizers
from bridge.comparison.settings import (
    Differences,
    compare_chat_templates,
    compare_configs,
    compare_fields,
    compare_generation,
)
from bridge.comparison.tensors import TensorsComparison, compare_models
from bridge.comparison.tokenizers import TokenizerComparison, compare_tokenizers


@dataclass(frozen=True)
class Comparison:
    """How two checkpoints, A and B, compare."""

    config: Differences
    """Fields of `GPT2Config` that differ."""
    extra: Differences
    """Other fields of `config.json` that differ. They do not affect the function."""
    tokenizer: TokenizerComparison
    generation: Differences
    """Generation settings that differ. A missing setting has its default."""
    chat_templates: Differences
    """Chat templates that differ. They are compared if both sides have a tokenizer."""
    tensors: TensorsComparison
    optimizer: OptimizerComparison

    @property
    def different_parts(self) -> tuple[str, ...]:
        """The parts that make the checkpoints different, in the order of the report."""
        parts = {
            "configuration": any(difference.matters for difference in self.config),
            "tokenizer": self.tokenizer.is_different,
            "generation settings": any(difference.matters for difference in self.generation),
            "chat templates": bool(self.chat_templates),
            "tensors": not self.tensors.is_same_function,
            "optimizer state": self.optimizer.is_different,
        }
        return tuple(name for name, is_different in parts.items() if is_different)

    @property
    def has_identical_model(self) -> bool:
        """Whether the configuration and the bits of the tensors give the same function."""
        return self.tensors.is_identical and not any(d.effect in ("function", "rounding") for d in self.config)

    @property
    def is_identical(self) -> bool:
        """Whether every part that both sides have is equal."""
        listed = (*self.config, *self.extra, *self.generation)
        return self.has_identical_model and not listed and not self.different_parts


def compare(a: Checkpoint, b: Checkpoint, progress: Callable[[str], None] = lambda what: None) -> Comparison:
    """Compare two checkpoints in any formats, without running them.

    Tensors are read one pair at a time.

    >>> import bridge
    >>> bundled = bridge.load("bundled")
    >>> compare(bundled, bundled.with_activation("relu")).different_parts
    ('configuration',)

    Args:
        a, b: the checkpoints.
        progress: called with the name of each part or tensor before it is read.

    Raises:
        BridgeError: a file of a checkpoint is damaged or not supported.
    """
    progress("tokenizers")
    tokenizer = compare_tokenizers(a, b)
    return Comparison(
        config=compare_configs(a.config, b.config),
        extra=compare_fields(a.extra, b.extra, "none"),
        tokenizer=tokenizer,
        generation=compare_generation(a, b, tokenizer.tokenizers),
        chat_templates=compare_chat_templates(a, b) if tokenizer.tokenizers else (),
        tensors=compare_models(a, b, progress),
        optimizer=compare_optimizers(a, b, progress),
    )

"""The facts about a shared checkpoint."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import bridge
from bridge import Checkpoint, GPT2Config, NoTokenizerError
from gpt2_jax.parity.certificates.certificate import Certificate
from gpt2_jax.sharing.evaluation import EvaluationFacts
from gpt2_jax.sharing.run import RunFacts


@dataclass(frozen=True)
class ModelFacts:
    """The content of a model card."""

    license: str
    config: GPT2Config
    dtypes: tuple[str, ...]
    """The dtypes of the weights, the most frequent one first."""
    fingerprint: str
    """`bridge.fingerprint` of the shared weights."""
    tokenizer: str | None
    """The kind of the tokenizer and the number of its ids; None without a tokenizer."""
    run: RunFacts | None = None
    evaluation: EvaluationFacts | None = None
    certificate: Certificate | None = None

    @property
    def num_parameters(self) -> int:
        return bridge.num_parameters(self.config)


def dtypes_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the dtypes of the weights, the most frequent one first."""
    counts = Counter(str(entry.dtype) for entry in checkpoint.tensors.entries.values())
    return tuple(dtype for dtype, _ in counts.most_common())


def tokenizer_of(checkpoint: Checkpoint) -> str | None:
    """Describe the tokenizer of a checkpoint, if it has one."""
    try:
        tokenizer = checkpoint.tokenizer()
    except NoTokenizerError:
        return None
    return f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids"

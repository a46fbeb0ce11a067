"""The result of an evaluation: of the whole text, of each token, and of each document."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class TokenScores:
    """How well a model predicts each token of a text. N is the number of tokens."""

    nats: Float[np.ndarray, " N"]
    """-ln p of each token, NaN where it is not predicted."""
    ranks: Int[np.ndarray, " N"]
    """The rank of each token among all tokens, 1 for the most likely one, or 0 where it is not predicted."""

    @classmethod
    def empty(cls, size: int, dtype: np.dtype) -> TokenScores:
        """Return the scores of a text of `size` tokens, none of which is predicted yet."""
        return cls(np.full(size, np.nan, dtype), np.zeros(size, np.int32))


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation, and its settings.

    Figures per word and per byte divide by the length of the whole text, although tokens that are not predicted add
    nothing to the sum. If windows do not overlap, these figures are therefore too low by the share of such tokens.
    """

    nats: float
    """Sum of -ln p over all predicted tokens."""
    predicted_tokens: int
    tokens: int
    """Tokens of the text."""
    windows: int
    context: int
    stride: int
    transformers_loss: float | None
    """The loss as the documentation of transformers computes it, for comparison with published figures.

    That code weights a window by its number of labels minus 1, because the shift removes a label. If windows overlap,
    the removed label is already ignored, so a later window that predicts n tokens has the weight n - 1. Without overlap
    the result equals `loss`; with long strides it is close to `loss`; with stride 1 it is the loss of the first window.
    It is None if documents are evaluated separately or only some tokens count, which that code does not support.
    """
    token_scores: TokenScores | None = field(default=None, repr=False, compare=False)
    """The score of each token, if requested."""

    @property
    def loss(self) -> float:
        """Cross entropy in nats per predicted token."""
        return self.nats / self.predicted_tokens

    @property
    def perplexity(self) -> float:
        """Perplexity per predicted token."""
        return exp(self.loss)

    def word_perplexity(self, words: int) -> float:
        """Return the perplexity per word of the text, which is comparable across tokenizers."""
        return exp(self.nats / words)

    def bits_per_byte(self, byte_count: int) -> float:
        """Return the bits per byte of the text in UTF-8, which are comparable across tokenizers."""
        return self.nats / math.log(2) / byte_count


@dataclass(frozen=True)
class DocumentScore:
    """How well a model predicts the tokens of one document."""

    tokens: int
    predicted_tokens: int
    nats: float
    """Sum of -ln p over its predicted tokens."""

    @property
    def loss(self) -> float | None:
        """Cross entropy in nats per predicted token, or None if no token is predicted."""
        return self.nats / self.predicted_tokens if self.predicted_tokens else None

    @property
    def perplexity(self) -> float | None:
        """Perplexity per predicted token, or None if no token is predicted."""
        return None if self.loss is None else exp(self.loss)


def document_scores(scores: TokenScores, document_ends: Int[np.ndarray, " D"]) -> list[DocumentScore]:
    """Return the score of each document. `document_ends` has the position after the last token of each, ascending."""
    found, start = [], 0
    for end in document_ends.tolist():
        predicted = scores.ranks[start:end] > 0
        nats = scores.nats[start:end][predicted].sum(dtype=np.float64)
        found.append(DocumentScore(end - start, int(predicted.sum()), float(nats)))
        start = end
    return found


def exp(x: float) -> float:
    """Return e to the power of x; infinity if that exceeds the range of a float."""
    return math.exp(x) if x < math.log(np.finfo(np.float64).max) else math.inf

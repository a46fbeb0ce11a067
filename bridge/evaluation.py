"""Perplexity of a text longer than the model's context: which tokens are predicted from which, and the figures.

The windows are those of "Perplexity of fixed-length models" in transformers' documentation: they begin at every
multiple of the stride, reach over `context` tokens, and the last is the first that reaches the end of the text.
Each window predicts the tokens that no earlier one reached, and never its own first token, which has nothing
before it. So all tokens but the very first are predicted once, from `context - stride` tokens at least, those
near the beginning from all there are; where the stride equals the context, the first of every window is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from bridge.config import GPT2Config
from bridge.errors import BridgeError

IGNORE_INDEX = -100
"""Label of a position without a loss, such as padding. The default `ignore_index` of PyTorch's cross entropy."""

TOKENS_PER_BATCH = 4096
"""What a batch holds unless asked otherwise: with GPT-2's vocabulary its logits take 0.8 GB in float32."""

Progress = Callable[[int, int], None]
"""Called with how much is done, and how much there is."""


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text, and what exactly was measured.

    Figures per word and per byte divide by all of the text. Tokens that are not predicted add nothing to them, so
    where windows do not overlap they come out low by the share of those tokens.
    """

    nats: float
    """Sum of -ln p over all predicted tokens."""
    predicted_tokens: int
    tokens: int
    """All tokens of the text."""
    windows: int
    context: int
    stride: int
    transformers_loss: float
    """The average by transformers' documentation, for comparison with figures made by its recipe.

    There a window that predicts n tokens weighs n - 1 wherever windows overlap, since one label is taken to be
    lost in the shift although it was already ignored. It equals `loss` where they do not overlap, nearly
    does at long strides, and at stride 1 it is that of the first window alone.
    """

    @property
    def loss(self) -> float:
        """Nats per predicted token."""
        return self.nats / self.predicted_tokens

    @property
    def perplexity(self) -> float:
        """Per predicted token."""
        return exp(self.loss)

    def word_perplexity(self, words: int) -> float:
        """Per word of the text, which is comparable across tokenizers."""
        return exp(self.nats / words)

    def bits_per_byte(self, byte_count: int) -> float:
        """Per byte of the text in UTF-8, which is comparable across tokenizers."""
        return self.nats / math.log(2) / byte_count


@dataclass(frozen=True)
class SlidingWindows:
    """The windows over a text, in batches of one shape. Axes: N tokens, W windows, B of them in a batch, T context."""

    ids: np.ndarray
    """Integers [N]."""
    context: int
    stride: int
    batch_size: int

    @classmethod
    def of(
        cls,
        config: GPT2Config,
        ids: np.ndarray,
        context: int | None = None,
        stride: int | None = None,
        batch_size: int | None = None,
    ) -> SlidingWindows:
        """Windows that this model can be evaluated on.

        Args:
            ids: the text's tokens, integers [N]; a memory-mapped file is read batch by batch.
            context: tokens per window; all of the model's positions unless given.
            stride: from one window's beginning to the next; half the context unless given.
            batch_size: windows per batch; as many as hold `TOKENS_PER_BATCH` unless given.

        Raises `BridgeError` naming everything that cannot be honoured.
        """
        context = config.n_positions if context is None else context
        stride = max(1, context // 2) if stride is None else stride
        batch_size = max(1, TOKENS_PER_BATCH // max(1, context)) if batch_size is None else batch_size
        problems = []
        if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or not ids.size):
            problems.append(f"the tokens must be integers in one row, not {ids.dtype} of shape {ids.shape}")
        elif ids.size < 2:
            count = ("no token", "one token")[ids.size]
            problems.append(f"the text has {count}; it takes two, because the first has nothing to be predicted from")
        elif ids.min() < 0 or ids.max() >= config.vocab_size:
            problems.append(f"tokens from {ids.min()} to {ids.max()}; the model's are 0 to {config.vocab_size - 1}")
        if not 2 <= context <= config.n_positions:
            problems.append(f"context={context}: must be from 2 to the model's n_positions={config.n_positions}")
        elif not 1 <= stride <= context:
            problems.append(f"stride={stride}: must be from 1 to context={context}, or tokens would be skipped")
        if batch_size < 1:
            problems.append(f"batch_size={batch_size}: must be at least 1")
        if problems:
            raise BridgeError("; ".join(problems))
        return cls(ids, context, stride, batch_size)

    def __len__(self) -> int:
        return 1 + max(0, math.ceil((self.ids.size - self.context) / self.stride))

    def bounds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each window, [W]: where it begins, the first token that it predicts, and where it ends (exclusive)."""
        begin_W = self.stride * np.arange(len(self))
        end_W = np.minimum(begin_W + self.context, self.ids.size)
        reached_W = np.concatenate([[0], end_W[:-1]])
        return begin_W, np.maximum(reached_W, begin_W + 1), end_W

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Input ids and labels, int32 [B, T]; the label of a position is the token after it, or `IGNORE_INDEX`.

        All have the same shape: what the last window and the last batch lack is made up by zeros whose labels are
        ignored. A causal model needs no mask for padding on the right.
        """
        begin_W, first_W, end_W = self.bounds()
        columns = np.arange(min(self.context, self.ids.size))
        for k in range(0, len(self), self.batch_size):
            batch = slice(k, k + self.batch_size)
            first, end = first_W[batch, None], end_W[batch, None]
            position_BT = begin_W[batch, None] + columns
            target_BT = position_BT + 1
            inputs_BT = np.where(position_BT < end, self._take(position_BT), 0)
            labels_BT = np.where((first <= target_BT) & (target_BT < end), self._take(target_BT), IGNORE_INDEX)
            missing = ((0, min(self.batch_size, len(self)) - len(inputs_BT)), (0, 0))
            yield np.pad(inputs_BT, missing), np.pad(labels_BT, missing, constant_values=IGNORE_INDEX)

    def _take(self, position_BT: np.ndarray) -> np.ndarray:
        return self.ids[np.minimum(position_BT, self.ids.size - 1)].astype(np.int32)

    def evaluation(self, losses: Iterable[np.ndarray], progress: Progress | None = None) -> Evaluation:
        """The figures from the losses [B, T] of each of `batches`: nats, 0 where ignored; summed in float64."""
        nats_W = np.zeros(len(self))
        for k, losses_BT in enumerate(losses):
            batch = nats_W[k * self.batch_size : (k + 1) * self.batch_size]
            batch[:] = losses_BT.sum(axis=1, dtype=np.float64)[: len(batch)]
            if progress is not None:
                progress(k * self.batch_size + len(batch), len(self))
        _, first_W, end_W = self.bounds()
        predicted_W = end_W - first_W
        labelled_W = np.diff(end_W, prepend=0)  # before the shift, as transformers' recipe counts them
        mean_W = nats_W / np.maximum(predicted_W, 1)
        return Evaluation(
            nats=float(nats_W.sum()),
            predicted_tokens=int(predicted_W.sum()),
            tokens=self.ids.size,
            windows=len(self),
            context=self.context,
            stride=self.stride,
            transformers_loss=float(np.average(mean_W, weights=labelled_W - 1)),
        )


def exp(x: float) -> float:
    """e to the x; infinite where no float is large enough."""
    return math.exp(x) if x < math.log(np.finfo(np.float64).max) else math.inf

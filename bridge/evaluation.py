"""Perplexity of a text that is longer than the model's context, with sliding windows.

The windows are those of "Perplexity of fixed-length models" in the documentation of transformers. They start at
multiples of the stride and have `context` tokens; the last window is the first that reaches the end of the text. A
window predicts the tokens that no earlier window contains, except its own first token, which has no context.

If the stride is less than the context, every token except the first of the text is predicted once, from at least
`context - stride` tokens (at the start of the text, from all earlier tokens). If the stride equals the context, the
first token of every window is not predicted.
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
"""Default size of a batch. With GPT-2's vocabulary, its logits take 0.8 GB in float32."""

Progress = Callable[[int, int], None]
"""Called with the number of windows done, and the number of all windows."""


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
    transformers_loss: float
    """The loss as the documentation of transformers computes it, for comparison with published figures.

    That code weights a window by its number of labels minus 1, because the shift removes a label. If windows overlap,
    the removed label is already ignored, so a later window that predicts n tokens has the weight n - 1. Without overlap
    the result equals `loss`; with long strides it is close to `loss`; with stride 1 it is the loss of the first window.
    """

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
class SlidingWindows:
    """The windows of a text, in batches of one shape.

    Axes: N tokens, W windows, B windows in a batch, T context.
    """

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
        """Make windows for a model.

        Args:
            config: the configuration of the model.
            ids: the tokens of the text, integers [N]. A memory-mapped file is read batch by batch.
            context: tokens per window. Default: the model's `n_positions`.
            stride: tokens from the start of a window to the start of the next. Default: half the context.
            batch_size: windows per batch. Default: `TOKENS_PER_BATCH` divided by the context.

        Raises:
            BridgeError: an argument is invalid. The message names every invalid argument.
        """
        context = config.n_positions if context is None else context
        stride = max(1, context // 2) if stride is None else stride
        batch_size = max(1, TOKENS_PER_BATCH // max(1, context)) if batch_size is None else batch_size
        problems = []
        if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or not ids.size):
            problems.append(
                f"the tokens must be a one-dimensional array of integers, not {ids.dtype} of shape {ids.shape}"
            )
        elif ids.size < 2:
            count = ("no token", "one token")[ids.size]
            problems.append(f"the text has {count}; at least two are needed, because the first has no context")
        elif ids.min() < 0 or ids.max() >= config.vocab_size:
            problems.append(f"tokens from {ids.min()} to {ids.max()}; the model has 0 to {config.vocab_size - 1}")
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
        """Return the start, the first predicted token and the end (exclusive) of each window, each [W]."""
        begin_W = self.stride * np.arange(len(self))
        end_W = np.minimum(begin_W + self.context, self.ids.size)
        reached_W = np.concatenate([[0], end_W[:-1]])
        return begin_W, np.maximum(reached_W, begin_W + 1), end_W

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield input ids and labels, int32 [B, T]. The label of a position is the next token, or `IGNORE_INDEX`.

        All batches have the same shape: the last window and the last batch are padded with zeros, whose labels are
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
        """Return the result of an evaluation. Sums are computed in float64.

        Args:
            losses: for each batch of `batches`, the losses [B, T] in nats, 0 for ignored labels.
            progress: called after each batch.
        """
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
    """Return e to the power of x; infinity if that exceeds the range of a float."""
    return math.exp(x) if x < math.log(np.finfo(np.float64).max) else math.inf

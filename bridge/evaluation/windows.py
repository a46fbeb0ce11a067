"""Perplexity of a text that is longer than the model's context, with sliding windows.

The windows are those of "Perplexity of fixed-length models" in the documentation of transformers. They start at
multiples of the stride and have `context` tokens; the last window is the first that reaches the end of the text. A
window predicts the tokens that no earlier window contains, except its own first token, which has no context.

If the stride is less than the context, every token except the first of the text is predicted once, from at least
`context - stride` tokens (at the start of the text, from all earlier tokens). If the stride equals the context, the
first token of every window is not predicted.

If documents are evaluated separately, each document has its own windows, as if it were the whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

from bridge.config import GPT2Config
from bridge.errors import BridgeError
from bridge.evaluation.labels import IGNORE_INDEX, TOKENS_PER_BATCH, LabelScores
from bridge.evaluation.result import Evaluation, TokenScores

Progress = Callable[[int, int], None]
"""Called with the number of windows done, and the number of all windows."""


@dataclass(frozen=True)
class TokenizedText:
    """The N tokens of a text, which of them count in the loss, and where its documents end."""

    ids: Int[np.ndarray, " N"]
    """A memory-mapped file is read batch by batch."""
    counts: Bool[np.ndarray, " N"] | None = None
    """Whether each token counts in the loss. By default, all tokens count."""
    document_ends: Int[np.ndarray, " D"] | None = None
    """The position after the last token of each of D documents, ascending. The documents are evaluated separately. By
    default, the text is one document."""

    def problems(self, vocab_size: int) -> list[str]:
        """Return one sentence for each reason why a model with this vocabulary cannot evaluate the text."""
        ids, counts, ends = self.ids, self.counts, self.document_ends
        if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or not ids.size):
            return [f"the tokens must be a one-dimensional array of integers, not {ids.dtype} of shape {ids.shape}"]
        if ids.size < 2:
            count = ("no token", "one token")[ids.size]
            return [f"the text has {count}; at least two are needed, because the first has no context"]
        found = []
        if ids.min() < 0 or ids.max() >= vocab_size:
            found.append(f"tokens from {ids.min()} to {ids.max()}; the model has 0 to {vocab_size - 1}")
        if counts is not None and (counts.shape != ids.shape or counts.dtype != bool):
            found.append(f"counts must be booleans of shape {ids.shape}, not {counts.dtype} of shape {counts.shape}")
        if ends is not None and not (ends.ndim == 1 and ends.size and _are_ends(ends, ids.size)):
            found.append(f"document_ends must be ascending positions, the last of which is {ids.size}")
        return found


@dataclass(frozen=True)
class SlidingWindows:
    """The windows of a text, in batches of one shape.

    Axes: N tokens, D documents, W windows, B windows in a batch, T context.
    """

    text: TokenizedText
    context: int
    stride: int
    batch_size: int

    @classmethod
    def of(
        cls,
        config: GPT2Config,
        text: np.ndarray | TokenizedText,
        context: int | None = None,
        stride: int | None = None,
        batch_size: int | None = None,
    ) -> SlidingWindows:
        """Make windows for a model.

        Args:
            config: the configuration of the model.
            text: the tokens of the text, integers [N], or a `TokenizedText`.
            context: tokens per window. Default: the model's `n_positions`.
            stride: tokens from the start of a window to the start of the next. Default: half the context.
            batch_size: windows per batch. Default: `TOKENS_PER_BATCH` divided by the context.

        Raises:
            BridgeError: an argument is invalid, or there is no token to predict. The message names every invalid
                argument.
        """
        text = text if isinstance(text, TokenizedText) else TokenizedText(np.asanyarray(text))
        context = config.n_positions if context is None else context
        stride = max(1, context // 2) if stride is None else stride
        batch_size = max(1, TOKENS_PER_BATCH // max(1, context)) if batch_size is None else batch_size
        problems = text.problems(config.vocab_size)
        if not 2 <= context <= config.n_positions:
            problems.append(f"context={context}: must be from 2 to the model's n_positions={config.n_positions}")
        elif not 1 <= stride <= context:
            problems.append(f"stride={stride}: must be from 1 to context={context}, or tokens would be skipped")
        if batch_size < 1:
            problems.append(f"batch_size={batch_size}: must be at least 1")
        if problems:
            raise BridgeError("; ".join(problems))
        windows = cls(text, context, stride, batch_size)
        if not windows._num_predicted.any():
            raise BridgeError(
                "there is nothing to predict: no token that counts in the loss has another token of its document "
                "before it; give longer documents, or records with a completion"
            )
        return windows

    def __len__(self) -> int:
        return len(self.bounds[0])

    @cached_property
    def bounds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The start, the first predicted token and the end (exclusive) of each window, each [W]."""
        end_D = self._document_ends
        begin_D = np.concatenate([[0], end_D[:-1]])
        count_D = 1 + np.maximum(0, -(-(end_D - begin_D - self.context) // self.stride))
        first_window_D = np.cumsum(count_D) - count_D
        number_W = np.arange(count_D.sum()) - np.repeat(first_window_D, count_D)  # within the document
        begin_W = np.repeat(begin_D, count_D) + self.stride * number_W
        end_W = np.minimum(begin_W + self.context, np.repeat(end_D, count_D))
        reached_W = np.where(number_W == 0, begin_W, np.concatenate([[0], end_W[:-1]]))
        return begin_W, np.maximum(reached_W, begin_W + 1), end_W

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield input ids and labels, int32 [B, T]. The label of a position is the next token, or `IGNORE_INDEX`.

        All batches have the same shape: the last window and the last batch are padded with zeros, whose labels are
        ignored. A causal model needs no mask for padding on the right.
        """
        _, _, end_W = self.bounds
        for k in range(0, len(self), self.batch_size):
            batch = slice(k, k + self.batch_size)
            target_BT, is_predicted_BT = self._targets(batch)
            inputs_BT = np.where(target_BT - 1 < end_W[batch, None], self._take(target_BT - 1), 0)
            labels_BT = np.where(is_predicted_BT, self._take(target_BT), IGNORE_INDEX)
            missing = ((0, min(self.batch_size, len(self)) - len(inputs_BT)), (0, 0))
            yield np.pad(inputs_BT, missing), np.pad(labels_BT, missing, constant_values=IGNORE_INDEX)

    def evaluation(self, scores: Iterable[LabelScores], progress: Progress | None = None) -> Evaluation:
        """Return the result of an evaluation. Sums are computed in float64.

        Args:
            scores: for each batch of `batches`. If they have ranks, the result has the score of each token.
            progress: called after each batch.
        """
        nats_W, tokens = np.zeros(len(self)), None
        for k, (nats_BT, ranks_BT) in enumerate(scores):
            batch = slice(k * self.batch_size, min((k + 1) * self.batch_size, len(self)))
            rows = batch.stop - batch.start
            nats_W[batch] = nats_BT.sum(axis=1, dtype=np.float64)[:rows]
            if ranks_BT is not None:
                tokens = tokens or TokenScores.empty(self.text.ids.size, nats_BT.dtype)
                target_BT, is_predicted_BT = self._targets(batch)
                predicted = target_BT[is_predicted_BT]
                tokens.nats[predicted] = nats_BT[:rows][is_predicted_BT]
                tokens.ranks[predicted] = ranks_BT[:rows][is_predicted_BT]
            if progress is not None:
                progress(batch.stop, len(self))
        return Evaluation(
            nats=float(nats_W.sum()),
            predicted_tokens=int(self._num_predicted.sum()),
            tokens=self.text.ids.size,
            windows=len(self),
            context=self.context,
            stride=self.stride,
            transformers_loss=self._transformers_loss(nats_W),
            token_scores=tokens,
        )

    @cached_property
    def _document_ends(self) -> np.ndarray:
        if self.text.document_ends is None:
            return np.array([self.text.ids.size])
        ends = np.asarray(self.text.document_ends, np.int64)
        return ends[np.diff(ends, prepend=0) > 0]  # an empty document has no window

    @cached_property
    def _num_predicted(self) -> np.ndarray:
        """The number of predicted tokens of each window, [W]."""
        _, first_W, end_W = self.bounds
        if self.text.counts is None:
            return end_W - first_W
        before = np.concatenate([[0], np.cumsum(self.text.counts)])
        return before[end_W] - before[first_W]

    def _targets(self, batch: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return the position in the text of each label, and whether it is predicted, [B, T]."""
        begin_W, first_W, end_W = self.bounds
        longest = int(np.diff(self._document_ends, prepend=0).max())
        target_BT = begin_W[batch, None] + np.arange(1, min(self.context, longest) + 1)
        is_predicted_BT = (first_W[batch, None] <= target_BT) & (target_BT < end_W[batch, None])
        if self.text.counts is not None:
            is_predicted_BT &= self.text.counts[np.minimum(target_BT, self.text.ids.size - 1)]
        return target_BT, is_predicted_BT

    def _take(self, position_BT: np.ndarray) -> np.ndarray:
        return self.text.ids[np.minimum(position_BT, self.text.ids.size - 1)].astype(np.int32)

    def _transformers_loss(self, nats_W: np.ndarray) -> float | None:
        if self.text.counts is not None or self.text.document_ends is not None:
            return None
        labelled_W = np.diff(self.bounds[2], prepend=0)  # before the shift, as transformers' recipe counts them
        mean_W = nats_W / np.maximum(self._num_predicted, 1)
        return float(np.average(mean_W, weights=labelled_W - 1))


def _are_ends(ends: np.ndarray, size: int) -> bool:
    """Whether document ends never decrease and the last one equals the number of tokens."""
    if not np.issubdtype(ends.dtype, np.integer):
        return False
    return bool(ends[0] >= 0 and (np.diff(ends) >= 0).all() and ends[-1] == size)

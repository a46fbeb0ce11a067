"""Perplexity of a text, computed in sliding windows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Int

from bridge.evaluation import Evaluation, LabelScores, Progress, SlidingWindows, TokenizedText
from gpt2_torch.model import GPT2
from gpt2_torch.ops.cross_entropy import cross_entropy, label_ranks


def evaluate(
    model: GPT2,
    ids: Int[np.ndarray, " N"] | TokenizedText,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    token_scores: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure how well the model predicts a text, in the windows of `bridge.evaluation`.

    Args:
        ids: the tokens of the text, on the host. May be a memory-mapped file. A `bridge.evaluation.TokenizedText` can
            also mark the tokens that count, and the ends of documents to evaluate separately.
        context: tokens per window; by default, all of the model's positions.
        stride: tokens from the start of one window to the next; by default, half the context.
        batch_size: windows per batch; by default, about 4096 tokens.
        token_scores: also return the score of each token.
        progress: called after every batch with the number of finished windows and of all windows.

    Raises `bridge.BridgeError` for arguments that the model or the text does not allow.
    """
    windows = SlidingWindows.of(model.config, ids, context, stride, batch_size)

    def all_scores() -> Iterator[LabelScores]:
        for input_ids, labels in windows.batches():
            yield label_scores(model, token_scores, input_ids, labels)

    was_training = model.training
    model.eval()
    try:
        return windows.evaluation(all_scores(), progress)
    finally:
        model.train(was_training)


@torch.no_grad()
def label_scores(model: GPT2, with_ranks: bool, input_ids: np.ndarray, labels: np.ndarray) -> LabelScores:
    """Return the loss of each label and, if requested, its rank. The arrays are on the host."""
    device = model.wte.weight.device
    targets = torch.from_numpy(labels).to(device)
    logits = model(torch.from_numpy(input_ids).to(device))
    ranks = label_ranks(logits, targets).cpu().numpy() if with_ranks else None
    return LabelScores(cross_entropy(logits, targets).cpu().numpy(), ranks)

"""Perplexity of a text, computed in sliding windows."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from bridge.evaluation import Evaluation, LabelScores, Progress, SlidingWindows, TokenizedText
from gpt2_jax.model import GPT2
from gpt2_jax.ops.cross_entropy import cross_entropy, label_ranks


def evaluate(
    model: GPT2,
    params: Mapping[str, Any],
    ids: Int[np.ndarray, " N"] | TokenizedText,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    token_scores: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure how well the model predicts a text, in the windows of `bridge.evaluation`. Compiles once.

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
            scores = label_scores(model, token_scores, params, input_ids, labels)
            yield LabelScores(*jax.tree.map(np.asarray, scores))

    return windows.evaluation(all_scores(), progress)


@functools.partial(jax.jit, static_argnums=(0, 1))
def label_scores(
    model: GPT2, with_ranks: bool, params: Mapping[str, Any], input_ids: Int[Array, "B T"], labels: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Int[Array, "B T"] | None]:
    """Return the fields of `bridge.evaluation.LabelScores`: the loss of each label and, if requested, its rank."""
    logits: Any = model.apply({"params": params}, input_ids)
    return cross_entropy(logits, labels), label_ranks(logits, labels) if with_ranks else None

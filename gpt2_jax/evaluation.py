"""Perplexity of a text, computed in sliding windows."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from bridge.evaluation import Evaluation, Progress, SlidingWindows
from gpt2_jax.model import GPT2
from gpt2_jax.ops.cross_entropy import cross_entropy


def evaluate(
    model: GPT2,
    params: Mapping[str, Any],
    ids: Int[np.ndarray, " N"],
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure how well the model predicts a text, in the windows of `bridge.evaluation`. Compiles once.

    Args:
        ids: the tokens of the text, on the host. May be a memory-mapped file.
        context: tokens per window; by default, all of the model's positions.
        stride: tokens from the start of one window to the next; by default, half the context.
        batch_size: windows per batch; by default, about 4096 tokens.
        progress: called after every batch with the number of finished windows and of all windows.

    Raises `bridge.BridgeError` for arguments that the model or the text does not allow.
    """
    windows = SlidingWindows.of(model.config, np.asarray(ids), context, stride, batch_size)

    def losses() -> Iterator[Float[np.ndarray, "B T"]]:
        for input_ids, labels in windows.batches():
            yield np.asarray(_losses(model, params, input_ids, labels))

    return windows.evaluation(losses(), progress)


@functools.partial(jax.jit, static_argnums=0)
def _losses(
    model: GPT2, params: Mapping[str, Any], input_ids: Int[Array, "B T"], labels: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    logits: Any = model.apply({"params": params}, input_ids)
    return cross_entropy(logits, labels)

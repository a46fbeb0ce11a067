"""Perplexity of a text by sliding windows."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from bridge.evaluation import Evaluation, Progress, SlidingWindows
from gpt2_jax.loss import cross_entropy
from gpt2_jax.model import GPT2


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
    """How well the model predicts a text, given as its tokens; `bridge.evaluation` says which from which.

    Args:
        ids: on the host; may be a memory-mapped file.
        context: tokens per window; all of the model's positions unless given.
        stride: from one window's beginning to the next; half the context unless given.
        batch_size: windows run together; about 4096 tokens' worth unless given.
        progress: called after every batch with the number of windows done and of all.

    Raises `bridge.BridgeError` for a request that cannot be honoured. Compiles once.
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

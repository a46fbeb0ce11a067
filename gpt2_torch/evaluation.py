"""Perplexity of a text by sliding windows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridge.evaluation import Evaluation, Progress, SlidingWindows
from gpt2_torch.loss import cross_entropy
from gpt2_torch.model import GPT2


def evaluate(
    model: GPT2,
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

    Raises `bridge.BridgeError` for a request that cannot be honoured.
    """
    windows = SlidingWindows.of(model.config, np.asarray(ids), context, stride, batch_size)
    device = model.wte.weight.device

    def losses() -> Iterator[Float[np.ndarray, "B T"]]:
        for input_ids, labels in windows.batches():
            given, wanted = torch.from_numpy(input_ids).to(device), torch.from_numpy(labels).to(device)
            yield _losses(model, given, wanted).cpu().numpy()

    was_training = model.training
    model.eval()
    try:
        return windows.evaluation(losses(), progress)
    finally:
        model.train(was_training)


@torch.no_grad()
def _losses(model: GPT2, input_ids: Int[Tensor, "B T"], labels: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    return cross_entropy(model(input_ids), labels)

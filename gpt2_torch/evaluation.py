"""Perplexity of a text, computed in sliding windows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridge.evaluation import Evaluation, Progress, SlidingWindows
from gpt2_torch.model import GPT2
from gpt2_torch.ops.cross_entropy import cross_entropy


def evaluate(
    model: GPT2,
    ids: Int[np.ndarray, " N"],
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure how well the model predicts a text, in the windows of `bridge.evaluation`.

    Args:
        ids: the tokens of the text, on the host. May be a memory-mapped file.
        context: tokens per window; by default, all of the model's positions.
        stride: tokens from the start of one window to the next; by default, half the context.
        batch_size: windows per batch; by default, about 4096 tokens.
        progress: called after every batch with the number of finished windows and of all windows.

    Raises `bridge.BridgeError` for arguments that the model or the text does not allow.
    """
    windows = SlidingWindows.of(model.config, np.asarray(ids), context, stride, batch_size)
    device = model.wte.weight.device

    def losses() -> Iterator[Float[np.ndarray, "B T"]]:
        for input_ids, labels in windows.batches():
            inputs, targets = torch.from_numpy(input_ids).to(device), torch.from_numpy(labels).to(device)
            yield _losses(model, inputs, targets).cpu().numpy()

    was_training = model.training
    model.eval()
    try:
        return windows.evaluation(losses(), progress)
    finally:
        model.train(was_training)


@torch.no_grad()
def _losses(model: GPT2, input_ids: Int[Tensor, "B T"], labels: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    return cross_entropy(model(input_ids), labels)

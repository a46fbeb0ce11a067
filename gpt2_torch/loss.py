"""The language-modelling loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bridge.evaluation import IGNORE_INDEX


def cross_entropy(logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """-log p(label) of each position in nats, in float32 at least; exactly 0 where the label is `IGNORE_INDEX`.

    Raises `IndexError` for any other label outside the vocabulary (on CPU; a GPU asserts by itself).
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide.flatten(0, 1), labels.flatten().long(), ignore_index=IGNORE_INDEX, reduction="none")
    return losses.unflatten(0, labels.shape)


def next_token_loss(logits: Float[Tensor, "B T V"], input_ids: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of each token given those before it, in nats; B (T - 1) predictions."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())

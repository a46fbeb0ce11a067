"""Cross-entropy of logits against labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bridge import IGNORE_INDEX


def cross_entropy(logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Return -log p(label) of each position, in nats, in at least float32. It is 0 where the label is `IGNORE_INDEX`.

    Raises `IndexError` for any other label outside the vocabulary (on CPU; a GPU raises a device-side assertion).
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide.flatten(0, 1), labels.flatten().long(), ignore_index=IGNORE_INDEX, reduction="none")
    return losses.unflatten(0, labels.shape)


def next_token_loss(logits: Float[Tensor, "B T V"], input_ids: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Return the mean cross-entropy, in nats, of the B (T - 1) tokens that have a token before them."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())

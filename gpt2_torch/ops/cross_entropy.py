"""Cross-entropy of logits against labels, and the ranks of the labels."""

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


def label_ranks(logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Return the rank of each label among all tokens, 1 for the most likely one, or 0 where it is `IGNORE_INDEX`.

    Of tokens with equal logits, the one with the lower id comes first.
    """
    counted_BT = labels != IGNORE_INDEX
    label_BT1 = labels.where(counted_BT, 0).long()[..., None]
    own_BT1 = logits.gather(-1, label_BT1)
    is_lower_id_BTV = torch.arange(logits.shape[-1], device=logits.device) < label_BT1
    is_above_BTV = (logits > own_BT1) | ((logits == own_BT1) & is_lower_id_BTV)
    return (1 + is_above_BTV.sum(-1)).where(counted_BT, 0)


def next_token_loss(logits: Float[Tensor, "B T V"], input_ids: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Return the mean cross-entropy, in nats, of the B (T - 1) tokens that have a token before them."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())

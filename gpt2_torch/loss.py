"""The language-modelling loss of a model on a batch."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from gpt2_torch.model import GPT2
from gpt2_torch.ops.cross_entropy import cross_entropy


def summed_loss(model: GPT2, batch: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """Return the sum of `cross_entropy` over a batch, in nats.

    Args:
        batch: `input_ids` [B, T]; `labels` [B, T], the token after each position, or `IGNORE_INDEX`; and optionally
            `attention_mask`, `segment_ids` and `position_ids` [B, T], as in the model's call.
    """
    logits_BTV = model(
        batch["input_ids"],
        batch.get("attention_mask"),
        segment_ids=batch.get("segment_ids"),
        position_ids=batch.get("position_ids"),
    )
    return cross_entropy(logits_BTV, batch["labels"]).sum()

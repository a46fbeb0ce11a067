"""Labels of a batch, and how well a model predicts them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

IGNORE_INDEX = -100
"""Label of a position without a loss, such as padding. The default `ignore_index` of PyTorch's cross entropy."""

TOKENS_PER_BATCH = 4096
"""Default size of a batch. With GPT-2's vocabulary, its logits take 0.8 GB in float32."""


class LabelScores(NamedTuple):
    """How well a model predicts each label of a batch."""

    nats: Float[np.ndarray, "B T"]
    """-ln p of the label, 0 where it is `IGNORE_INDEX`."""
    ranks: Int[np.ndarray, "B T"] | None = None
    """The rank of the label among all tokens, 1 for the most likely one, or 0 where it is `IGNORE_INDEX`. Of tokens
    with equal logits, the one with the lower id comes first. None if only the losses were computed."""

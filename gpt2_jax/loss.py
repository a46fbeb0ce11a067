"""The language-modelling loss."""

from __future__ import annotations

import optax
from jaxtyping import Array, Float, Int


def next_token_loss(logits: Float[Array, "B T V"], input_ids: Int[Array, "B T"]) -> Float[Array, ""]:
    """Mean cross-entropy of each token given those before it, in nats; B (T - 1) predictions."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], input_ids[:, 1:]).mean()

"""The language-modelling loss of a model on a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float, PRNGKeyArray

from gpt2_jax.model import GPT2
from gpt2_jax.ops.cross_entropy import summed_cross_entropy


def summed_loss(
    model: GPT2,
    params: Any,
    batch: Mapping[str, Any],
    dropout_key: PRNGKeyArray | None = None,
    *,
    lora: Any = None,
) -> Float[Array, ""]:
    """Return the sum of `cross_entropy` over a batch, in nats.

    Args:
        batch: `input_ids` [B, T]; `labels` [B, T], the token after each position, or `IGNORE_INDEX`; and optionally
            `attention_mask`, `segment_ids` and `position_ids` [B, T], as in the model's call.
        dropout_key: apply dropout at the configured rates.
        lora: the adapter, for a model with `lora` set.
    """
    hidden_BTD = apply_to_batch(model, params, batch, dropout_key, lora=lora, method="last_hidden_state")
    head = params["wte" if model.config.tie_word_embeddings else "lm_head"]["embedding"]
    return summed_cross_entropy(hidden_BTD, head, batch["labels"], vocab_size=model.config.vocab_size)


def apply_to_batch(
    model: GPT2, params: Any, batch: Mapping[str, Any], dropout_key: PRNGKeyArray | None, *, lora: Any, method: str
) -> Any:
    """Call a method of the model, such as `__call__`, on a batch. Arguments as in `summed_loss`."""
    return model.apply(
        {"params": params} if lora is None else {"params": params, "lora": lora},
        batch["input_ids"],
        batch.get("attention_mask"),
        segment_ids=batch.get("segment_ids"),
        position_ids=batch.get("position_ids"),
        deterministic=dropout_key is None,
        rngs={} if dropout_key is None else {"dropout": dropout_key},
        method=method,
    )

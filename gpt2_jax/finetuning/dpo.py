"""Direct preference optimization: the loss, from log-probabilities of a policy and a frozen reference.

Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", equation 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from gpt2_jax.loss import apply_to_batch
from gpt2_jax.model import GPT2
from gpt2_jax.ops.cross_entropy import cross_entropy


class DPOLoss(NamedTuple):
    """The loss of each pair, and the implicit rewards beta log(policy / reference) of both answers."""

    losses: Float[Array, " B"]
    chosen_rewards: Float[Array, " B"]
    rejected_rewards: Float[Array, " B"]


def sequence_log_probs(
    model: GPT2,
    params: Any,
    batch: Mapping[str, Any],
    dropout_key: PRNGKeyArray | None = None,
    *,
    lora: Any = None,
) -> Float[Array, " B"]:
    """Return log p(answer | prompt) of each row: summed over the labels that count, in all segments of the row.

    Args:
        batch: as in `gpt2_jax.summed_loss`. The labels of the prompt and of padding are `IGNORE_INDEX`.
        dropout_key: apply dropout at the configured rates.
        lora: the adapter, for a model with `lora` set. The reference is `model.clone(lora=None)` without it.
    """
    logits = apply_to_batch(model, params, batch, dropout_key, lora=lora, method="__call__")
    return -cross_entropy(logits, jnp.asarray(batch["labels"])).sum(axis=-1)


def dpo_loss(
    policy_chosen: Float[Array, " B"],
    policy_rejected: Float[Array, " B"],
    reference_chosen: Float[Array, " B"],
    reference_rejected: Float[Array, " B"],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> DPOLoss:
    """Return -log sigmoid(beta (log-ratio of the chosen answer - log-ratio of the rejected answer)) of each pair.

    A log-ratio is log(policy / reference). The arguments are the results of `sequence_log_probs`. The reference is
    frozen: compute its log-probabilities outside the function that is differentiated.

    >>> import jax.numpy as jnp
    >>> x = jnp.zeros(1)
    >>> float(dpo_loss(x, x, x, x).losses[0])  # log 2, before the first step
    0.6931471824645996

    Args:
        beta: the strength of the constraint to stay near the reference.
        label_smoothing: the probability that a preference is wrong (conservative DPO, Mitchell 2023).
    """
    chosen_rewards = beta * (policy_chosen - reference_chosen)
    rejected_rewards = beta * (policy_rejected - reference_rejected)
    margin = chosen_rewards - rejected_rewards
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)
    return DPOLoss(losses, chosen_rewards, rejected_rewards)

"""Selection of the next token from its logits: greedily, or by sampling. Pure functions of each row, in float32.

The `keep_` functions return the logits with those of the tokens that they remove set to minus infinity. Thresholds are
found by bisection of the float32 range, because sorting a row of 50257 takes XLA on CPU 10 ms instead of 1.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bridge.generation.processors import LogitsProcessors


def select_token(logits_RV: Float[Array, "R V"], noise_R: Float[Array, " R"], p: LogitsProcessors) -> Int[Array, " R"]:
    """Return the next token of each row: the most likely one or, with a temperature, a sample.

    Args:
        noise_R: numbers from [0, 1). Each determines the sample of its row.
    """
    if p.temperature is None:
        return _argmax(logits_RV)
    return inverse_cdf_sample(truncate(logits_RV, p), noise_R)


def truncate(logits_RV: Float[Array, "R V"], p: LogitsProcessors) -> Float[Array, "R V"]:
    """Divide the logits by the temperature and apply the processors that only sampling uses, in transformers' order."""
    logits_RV = logits_RV.astype(jnp.float32) / p.temperature
    if p.top_k is not None:
        logits_RV = keep_top_k(logits_RV, p.top_k)
    if p.top_p is not None:
        logits_RV = keep_top_p(logits_RV, p.top_p)
    if p.min_p is not None:
        logits_RV = keep_min_p(logits_RV, p.min_p)
    if p.typical_p is not None:
        logits_RV = keep_typical(logits_RV, p.typical_p)
    if p.epsilon_cutoff is not None:
        logits_RV = keep_epsilon(logits_RV, p.epsilon_cutoff)
    if p.eta_cutoff is not None:
        logits_RV = keep_eta(logits_RV, p.eta_cutoff)
    return logits_RV


def _argmax(logits_RV: Float[Array, "R V"]) -> Int[Array, " R"]:
    """Return the index of the first maximum. XLA's own argmax takes four times as long on CPU."""
    V = logits_RV.shape[-1]
    largest_R1 = logits_RV.max(-1, keepdims=True)
    return jnp.where(logits_RV >= largest_R1, jnp.arange(V, dtype=jnp.int32), V - 1).min(-1)


def keep_top_k(logits_RV: Float[Array, "R V"], k: Int[Array, ""]) -> Float[Array, "R V"]:
    """Keep the k most likely tokens, and those as likely as the last of them (Fan et al. 2018)."""
    return _keep_from(logits_RV, lambda above: above.sum(-1) < k)


def keep_top_p(logits_RV: Float[Array, "R V"], p: Float[Array, ""]) -> Float[Array, "R V"]:
    """Keep the smallest set of most likely tokens whose total probability reaches p (Holtzman et al. 2020).

    Tokens as likely as the last of the set are kept too.
    """
    probs_RV = jax.nn.softmax(logits_RV, axis=-1)
    # p = 1 keeps all tokens, even if rounding reaches 1 before the last; p that rounds to 0 keeps the most likely one.
    p = jnp.where(p < 1.0, jnp.maximum(p, jnp.finfo(jnp.float32).tiny), jnp.inf)
    return _keep_from(logits_RV, lambda above: jnp.where(above, probs_RV, 0.0).sum(-1) < p)


def keep_min_p(logits_RV: Float[Array, "R V"], p: Float[Array, ""]) -> Float[Array, "R V"]:
    """Keep tokens with at least p times the most likely token's probability (Nguyen et al. 2024)."""
    return jnp.where(logits_RV >= logits_RV.max(-1, keepdims=True) + jnp.log(p), logits_RV, -jnp.inf)


def keep_typical(logits_RV: Float[Array, "R V"], p: Float[Array, ""]) -> Float[Array, "R V"]:
    """Keep the smallest set of tokens whose total probability reaches p, the most typical first (Meister et al. 2022).

    A token is the more typical, the closer its information is to the entropy. Tokens as typical as the last of the set
    are kept too.
    """
    logprobs_RV = jax.nn.log_softmax(logits_RV, axis=-1)
    probs_RV = jnp.exp(logprobs_RV)
    typicality_RV = -jnp.abs(logprobs_RV + _entropy(logprobs_RV))
    p = jnp.maximum(p, jnp.finfo(jnp.float32).tiny)
    return _keep_from(logits_RV, lambda above: jnp.where(above, probs_RV, 0.0).sum(-1) < p, typicality_RV)


def keep_epsilon(logits_RV: Float[Array, "R V"], epsilon: Float[Array, ""]) -> Float[Array, "R V"]:
    """Keep the most likely token, and tokens with a probability of at least `epsilon` (Hewitt et al. 2022)."""
    return _keep_or_most_likely(logits_RV, jax.nn.softmax(logits_RV, axis=-1) >= epsilon)


def keep_eta(logits_RV: Float[Array, "R V"], epsilon: Float[Array, ""]) -> Float[Array, "R V"]:
    """Keep the most likely token, and tokens with a probability of at least min(epsilon, sqrt(epsilon) exp(-entropy)).

    Source: Hewitt et al. 2022, section 4.3.
    """
    logprobs_RV = jax.nn.log_softmax(logits_RV, axis=-1)
    eta_R1 = jnp.minimum(epsilon, jnp.sqrt(epsilon) * jnp.exp(-_entropy(logprobs_RV)))
    return _keep_or_most_likely(logits_RV, jnp.exp(logprobs_RV) >= eta_R1)


def _entropy(logprobs_RV: Float[Array, "R V"]) -> Float[Array, "R 1"]:
    """Return the entropy in nats. Removed tokens contribute nothing."""
    return -jnp.where(logprobs_RV > -jnp.inf, jnp.exp(logprobs_RV) * logprobs_RV, 0.0).sum(-1, keepdims=True)


def inverse_cdf_sample(logits_RV: Float[Array, "R V"], noise_R: Float[Array, " R"]) -> Int[Array, " R"]:
    """Return the first token whose cumulative probability exceeds the noise.

    The same noise gives the same token in both backends, except for rounding. The search is for a block of tokens, then
    for the token in the block, because shorter sums are faster and round less.
    """
    R, V = logits_RV.shape
    width = 256
    weights_RV = jnp.exp(logits_RV - logits_RV.max(-1, keepdims=True))
    blocks_RNW = jnp.pad(weights_RV, ((0, 0), (0, -V % width))).reshape(R, -1, width)
    block_R, rest_R = _search_cdf(blocks_RNW.sum(-1), noise_R)
    in_block_RW = jnp.take_along_axis(blocks_RNW, block_R[:, None, None], axis=1)[:, 0]
    within_R = _search_cdf(in_block_RW, rest_R)[0]
    return (block_R * width + within_R).astype(jnp.int32)


def _search_cdf(
    weights_RN: Float[Array, "R N"], noise_R: Float[Array, " R"]
) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """Return the first index whose cumulative weight exceeds `noise_R` times the total, and the noise within it."""
    cumulative_RN = jnp.cumsum(weights_RN, axis=-1)
    target_R1 = (noise_R * cumulative_RN[:, -1])[:, None]
    exceeds_RN = (cumulative_RN > target_R1) & (weights_RN > 0.0)  # XLA's cumulative sum may rise at a weight of 0
    # Rounding may put the target past the end. The most likely token has a positive weight.
    found_R1 = jnp.where(exceeds_RN.any(-1), exceeds_RN.argmax(-1), weights_RN.argmax(-1))[:, None]
    weight_R1 = jnp.take_along_axis(weights_RN, found_R1, axis=-1)
    below_R1 = jnp.take_along_axis(cumulative_RN, found_R1, axis=-1) - weight_R1
    return found_R1[:, 0], jnp.clip((target_R1 - below_R1) / weight_R1, 0.0, 1.0)[:, 0]


def _keep_from(
    logits_RV: Float[Array, "R V"],
    allowed: Callable[[Bool[Array, "R V"]], Bool[Array, " R"]],
    order_by_RV: Float[Array, "R V"] | None = None,
) -> Float[Array, "R V"]:
    """Keep tokens from the lowest threshold on for which `allowed` holds, a function of which tokens are above it.

    The threshold applies to `order_by_RV`, by default the logits.
    """
    order_RV = _as_ordered_integers(logits_RV if order_by_RV is None else order_by_RV)

    def bisect(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_R, high_R = bounds
        middle_R = (low_R >> 1) + (high_R >> 1) + (low_R & high_R & 1)  # rounded down, without overflow
        holds_R = allowed(order_RV > middle_R[:, None])
        return jnp.where(holds_R, low_R, middle_R + 1), jnp.where(holds_R, middle_R, high_R)

    lowest, highest = (jnp.full(logits_RV.shape[0], end, jnp.int32) for end in (-(2**31), 2**31 - 1))
    threshold_R = jax.lax.fori_loop(0, 32, bisect, (lowest, highest))[1]
    return jnp.where(order_RV >= threshold_R[:, None], logits_RV, -jnp.inf)


def _keep_or_most_likely(logits_RV: Float[Array, "R V"], keeps_RV: Bool[Array, "R V"]) -> Float[Array, "R V"]:
    return jnp.where(keeps_RV | (logits_RV >= logits_RV.max(-1, keepdims=True)), logits_RV, -jnp.inf)


def _as_ordered_integers(x: Float[Array, "R V"]) -> Int[Array, "R V"]:
    """Return int32 numbers in the same order as `x`: the bits of float32, inverted for negative numbers."""
    x = jnp.where(x == 0.0, 0.0, x)  # the bits of -0.0 are different
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)

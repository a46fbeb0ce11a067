"""How the next token is chosen from its logits: pure functions, row by row, in float32.

A filter gives the logits with those it forbids at minus infinity. Thresholds are found by halving the range of
float32 and not by sorting, which takes XLA 10 ms for a row of 50257 on CPU, against 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bridge.generation.config import GenerationConfig


class Filters(NamedTuple):
    """The numbers of a `GenerationConfig`'s filters; what is None is not compiled."""

    repetition_penalty: Float[Array, ""] | None
    temperature: Float[Array, ""] | None
    top_k: Int[Array, ""] | None
    top_p: Float[Array, ""] | None
    min_p: Float[Array, ""] | None

    @classmethod
    def of(cls, request: GenerationConfig) -> Filters:
        def given(name: str, dtype: type) -> Array | None:
            value = getattr(request, name)
            return None if value is None else jnp.asarray(value, dtype)

        penalty = given("repetition_penalty", jnp.float32)
        if request.greedy:  # the others leave the likeliest token where it is
            return cls(penalty, None, None, None, None)
        largest = min(request.top_k or 2**31 - 1, 2**31 - 1)
        top_k = None if request.top_k is None else jnp.asarray(largest, jnp.int32)
        return cls(
            penalty, given("temperature", jnp.float32), top_k, given("top_p", jnp.float32), given("min_p", jnp.float32)
        )


def choose(
    logits_RV: Float[Array, "R V"], draws_R: Float[Array, " R"], filters: Filters, seen_RV: Bool[Array, "R V"] | None
) -> Int[Array, " R"]:
    """The next token of each row: drawn with a number from [0, 1), or without a temperature the likeliest.

    `seen_RV`: the tokens that a row has, for the repetition penalty.
    """
    if filters.repetition_penalty is not None and seen_RV is not None:
        logits_RV = penalize_repetition(logits_RV, seen_RV, filters.repetition_penalty)
    if filters.temperature is None:
        return _likeliest(logits_RV)
    logits_RV = logits_RV.astype(jnp.float32) / filters.temperature
    for keep, value in ((keep_top_k, filters.top_k), (keep_top_p, filters.top_p), (keep_min_p, filters.min_p)):
        if value is not None:
            logits_RV = keep(logits_RV, value)
    return draw(logits_RV, draws_R)


def _likeliest(logits_RV: Float[Array, "R V"]) -> Int[Array, " R"]:
    """The first of the largest; XLA's own argmax takes four times as long on CPU."""
    V = logits_RV.shape[-1]
    largest_R1 = logits_RV.max(-1, keepdims=True)
    return jnp.where(logits_RV >= largest_R1, jnp.arange(V, dtype=jnp.int32), V - 1).min(-1)


def penalize_repetition(
    logits_RV: Float[Array, "R V"], seen_RV: Bool[Array, "R V"], penalty: Float[Array, ""]
) -> Float[Array, "R V"]:
    """Logits of tokens that were there, divided by `penalty` where positive, else multiplied (Keskar et al. 2019)."""
    penalty = penalty.astype(logits_RV.dtype)
    return jnp.where(seen_RV, jnp.where(logits_RV > 0, logits_RV / penalty, logits_RV * penalty), logits_RV)


def keep_top_k(logits_RV: Float[Array, "R V"], k: Int[Array, ""]) -> Float[Array, "R V"]:
    """The k likeliest tokens, and those as likely as the last of them (Fan et al. 2018)."""
    return _keep_from(logits_RV, lambda above: above.sum(-1) < k)


def keep_top_p(logits_RV: Float[Array, "R V"], p: Float[Array, ""]) -> Float[Array, "R V"]:
    """Those than which all likelier ones together have a probability below p (Holtzman et al. 2020)."""
    probs_RV = jax.nn.softmax(logits_RV, axis=-1)
    # 1 keeps all, also where rounding reaches 1 before the last; a number that rounds to 0 keeps the likeliest.
    p = jnp.where(p < 1.0, jnp.maximum(p, jnp.finfo(jnp.float32).tiny), jnp.inf)
    return _keep_from(logits_RV, lambda above: jnp.where(above, probs_RV, 0.0).sum(-1) < p)


def keep_min_p(logits_RV: Float[Array, "R V"], p: Float[Array, ""]) -> Float[Array, "R V"]:
    """Those with at least p times the probability of the likeliest (Nguyen et al. 2024)."""
    return jnp.where(logits_RV >= logits_RV.max(-1, keepdims=True) + jnp.log(p), logits_RV, -jnp.inf)


def draw(logits_RV: Float[Array, "R V"], draws_R: Float[Array, " R"]) -> Int[Array, " R"]:
    """The token at which the cumulative probability passes the draw: of one number, the same in any backend.

    First the block of tokens, then the one in it: shorter sums are faster, and rounded less.
    """
    R, V = logits_RV.shape
    width = 256
    weights_RV = jnp.exp(logits_RV - logits_RV.max(-1, keepdims=True))
    blocks_RNW = jnp.pad(weights_RV, ((0, 0), (0, -V % width))).reshape(R, -1, width)
    block_R, rest_R = _passes(blocks_RNW.sum(-1), draws_R)
    in_block_RW = jnp.take_along_axis(blocks_RNW, block_R[:, None, None], axis=1)[:, 0]
    within_R = _passes(in_block_RW, rest_R)[0]
    return (block_R * width + within_R).astype(jnp.int32)


def _passes(
    weights_RN: Float[Array, "R N"], draws_R: Float[Array, " R"]
) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """Where the cumulative weight passes this part of the total; and which part of that weight is below it."""
    upto_RN = jnp.cumsum(weights_RN, axis=-1)
    wanted_R1 = (draws_R * upto_RN[:, -1])[:, None]
    passed_RN = (upto_RN > wanted_R1) & (weights_RN > 0.0)  # XLA's sums may rise where the weight is 0
    # Rounding may put the last draw past the end; the likeliest is a token that may be drawn.
    found_R1 = jnp.where(passed_RN.any(-1), passed_RN.argmax(-1), weights_RN.argmax(-1))[:, None]
    weight_R1 = jnp.take_along_axis(weights_RN, found_R1, axis=-1)
    below_R1 = jnp.take_along_axis(upto_RN, found_R1, axis=-1) - weight_R1
    return found_R1[:, 0], jnp.clip((wanted_R1 - below_R1) / weight_R1, 0.0, 1.0)[:, 0]


def _keep_from(
    logits_RV: Float[Array, "R V"], allowed: Callable[[Bool[Array, "R V"]], Bool[Array, " R"]]
) -> Float[Array, "R V"]:
    """The logits from the lowest threshold for which `allowed` holds, given which logits are above it."""
    order_RV = _as_ordered_integers(logits_RV)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_R, high_R = bounds
        middle_R = (low_R >> 1) + (high_R >> 1) + (low_R & high_R & 1)  # rounded down, without overflow
        holds_R = allowed(order_RV > middle_R[:, None])
        return jnp.where(holds_R, low_R, middle_R + 1), jnp.where(holds_R, middle_R, high_R)

    lowest, highest = (jnp.full(logits_RV.shape[0], end, jnp.int32) for end in (-(2**31), 2**31 - 1))
    threshold_R = jax.lax.fori_loop(0, 32, halve, (lowest, highest))[1]
    return jnp.where(order_RV >= threshold_R[:, None], logits_RV, -jnp.inf)


def _as_ordered_integers(x: Float[Array, "R V"]) -> Int[Array, "R V"]:
    """Integers in the order of the float32 numbers: their bits, those of negative ones turned round."""
    x = jnp.where(x == 0.0, 0.0, x)  # -0.0 has other bits
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)

"""The logits processors of every decoding method: functions of each row's logits and of its tokens so far.

They apply before sampling, in float32 or float64, as in transformers. A processor that removes tokens sets their logits
to minus infinity. `gpt2_jax.sampling` has the processors that only sampling uses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bridge.generation.config import GenerationConfig
from bridge.generation.processors import ANY, MOST_FAVOUR, LogitsProcessors, SequenceBias


class History(NamedTuple):
    """The tokens of each row so far. S is the maximum length."""

    ids_RS: Int[Array, "R S"] | None
    """`bridge.generation.processors.PADDING` where no token is. None if no processor depends on the order."""
    seen_RV: Bool[Array, "R V"] | None
    """Which tokens each row contains. Only for the repetition penalty."""
    length: Int[Array, ""]
    """The number of positions in use, padding included."""
    num_new: Int[Array, ""]
    """The number of tokens since the prompt."""

    def select_rows(self, rows_R: Int[Array, " R"]) -> History:
        """Return a copy with these rows. A row may occur more than once."""
        ids_RS, seen_RV = (None if x is None else x[rows_R] for x in (self.ids_RS, self.seen_RV))
        return self._replace(ids_RS=ids_RS, seen_RV=seen_RV)

    def followed_by(self, token_R: Int[Array, " R"]) -> History:
        """Add one token to each row."""
        ids_RS, seen_RV = self.ids_RS, self.seen_RV
        if ids_RS is not None:
            ids_RS = ids_RS.at[:, self.length].set(token_R, mode="drop")
        if seen_RV is not None:
            seen_RV = seen_RV.at[jnp.arange(len(token_R)), token_R].set(True)
        return History(ids_RS, seen_RV, self.length + 1, self.num_new + 1)


def on_device(config: GenerationConfig, vocab_size: int) -> LogitsProcessors:
    """Return the processors of `config` as arrays. Those that are None are not compiled."""

    def to_array(value: Any) -> Array:
        if isinstance(value, int):  # tokens, and numbers of tokens
            return jnp.asarray(max(min(value, 2**31 - 1), -(2**31)), jnp.int32)
        return jnp.asarray(value, jnp.float32 if isinstance(value, float) else None)

    return jax.tree.map(to_array, LogitsProcessors.of(config, vocab_size))


def process_logits(logits_RV: Float[Array, "R V"], p: LogitsProcessors, history: History) -> Float[Array, "R V"]:
    """Apply all processors but those of sampling, in transformers' order."""
    if not p.change_scores:
        return logits_RV
    logits_RV = logits_RV.astype(jnp.promote_types(logits_RV.dtype, jnp.float32))
    ids_RS, seen_RV, length, n = history
    if p.sequence_bias is not None and ids_RS is not None:
        logits_RV = add_sequence_bias(logits_RV, ids_RS, length, p.sequence_bias)
    if p.repetition_penalty is not None and seen_RV is not None:
        logits_RV = penalize_repetition(logits_RV, seen_RV, p.repetition_penalty)
    if p.no_repeat_ngram_size is not None and ids_RS is not None:
        logits_RV = forbid_repeated_ngrams(logits_RV, ids_RS, length, p.no_repeat_ngram_size)
    if p.bad_words is not None and ids_RS is not None:
        logits_RV = add_sequence_bias(logits_RV, ids_RS, length, p.bad_words)
    if p.min_new_tokens is not None:
        logits_RV = jnp.where(p.eos_V & (n < p.min_new_tokens), -jnp.inf, logits_RV)
    is_forced_R = None
    if p.forced_bos_token_id is not None and ids_RS is not None:
        is_forced_R = (ids_RS >= 0).sum(-1) == n + 1  # the prompt has one token
        is_forced_RV = is_forced_R[:, None] & (n == 0)
        only_V = jnp.where(jnp.arange(logits_RV.shape[-1]) == p.forced_bos_token_id, 0.0, -jnp.inf)
        logits_RV = jnp.where(is_forced_RV, only_V, logits_RV)
    if p.forced_eos_V is not None:
        logits_RV = jnp.where(n == p.last_step, jnp.where(p.forced_eos_V, 0.0, -jnp.inf), logits_RV)
    if p.decay_start is not None:
        logits_RV = favour_end(logits_RV, p.eos_V, n - p.decay_start, p.decay_factor)
    if p.suppressed_V is not None:
        logits_RV = jnp.where(p.suppressed_V, -jnp.inf, logits_RV)
    if p.first_suppressed_V is not None:
        first_R1 = 0 if is_forced_R is None else is_forced_R[:, None].astype(jnp.int32)
        logits_RV = jnp.where(p.first_suppressed_V & (n == first_R1), -jnp.inf, logits_RV)
    return logits_RV


def add_sequence_bias(
    logits_RV: Float[Array, "R V"], ids_RS: Int[Array, "R S"], length: Int[Array, ""], biases: SequenceBias
) -> Float[Array, "R V"]:
    """Add the bias of each sequence whose last token would be the next one. A bias of minus infinity removes it."""
    W = biases.prefix_KW.shape[1]
    places_W = length - W + jnp.arange(W)
    tail_RW = jnp.where(places_W >= 0, ids_RS[:, jnp.maximum(places_W, 0)], ANY)
    matches_RK = ((tail_RW[:, None] == biases.prefix_KW) | (biases.prefix_KW == ANY)).all(-1)
    added_RK = jnp.where(matches_RK, biases.bias_K, 0.0).astype(logits_RV.dtype)
    return logits_RV + jnp.zeros_like(logits_RV).at[:, biases.token_K].add(added_RK)


def penalize_repetition(
    logits_RV: Float[Array, "R V"], seen_RV: Bool[Array, "R V"], penalty: Float[Array, ""]
) -> Float[Array, "R V"]:
    """Divide positive logits of seen tokens by `penalty`, and multiply negative ones (Keskar et al. 2019)."""
    penalty = penalty.astype(logits_RV.dtype)
    return jnp.where(seen_RV, jnp.where(logits_RV > 0, logits_RV / penalty, logits_RV * penalty), logits_RV)


def forbid_repeated_ngrams(
    logits_RV: Float[Array, "R V"], ids_RS: Int[Array, "R S"], length: Int[Array, ""], size: Int[Array, ""]
) -> Float[Array, "R V"]:
    """Remove the tokens that would complete a sequence of `size` tokens which the row contains (Paulus et al. 2017)."""
    places_S = jnp.arange(ids_RS.shape[1])

    def narrow(i: Int[Array, ""], matches_RS: Bool[Array, "R S"]) -> Bool[Array, "R S"]:
        """Keep the places whose token i places earlier is the row's i-th token from the end."""
        return matches_RS & (jnp.roll(ids_RS, i, axis=1) == ids_RS[:, length - i][:, None])

    possible_RS = (places_S >= size - 1) & (places_S < length) & (ids_RS >= 0)
    matches_RS = jax.lax.fori_loop(1, jnp.minimum(size, length + 1), narrow, possible_RS)
    rows_R1, forbidden_RV = jnp.arange(len(ids_RS))[:, None], jnp.zeros(logits_RV.shape, bool)
    forbidden_RV = forbidden_RV.at[rows_R1, jnp.maximum(ids_RS, 0)].max(matches_RS)
    return jnp.where(forbidden_RV, -jnp.inf, logits_RV)


def favour_end(
    logits_RV: Float[Array, "R V"], eos_V: Bool[Array, " V"], steps: Int[Array, ""], factor: Float[Array, ""]
) -> Float[Array, "R V"]:
    """Add |logit| * (factor^steps - 1) to end-of-sequence tokens, if `steps` is positive.

    The factor and the result are limited.
    """
    power = jnp.minimum(factor ** steps.astype(jnp.float32), MOST_FAVOUR).astype(logits_RV.dtype)
    favoured_RV = jnp.minimum(logits_RV + jnp.abs(logits_RV) * (power - 1.0), MOST_FAVOUR)
    return jnp.where(eos_V & (steps > 0) & jnp.isfinite(logits_RV), favoured_RV, logits_RV)

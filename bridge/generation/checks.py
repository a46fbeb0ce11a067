"""Validation of a `GenerationConfig`: every invalid field is named."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bridge.config import GPT2Config
from bridge.errors import quoted

if TYPE_CHECKING:
    from bridge.generation.config import GenerationConfig

LARGEST_SEED = 2**32 - 1

MOST_SEQUENCE_IDS = 2**18
"""Limit for the number of sequences times the length of the longest one: the tokens that a step compares per row."""

MOST_ROWS = 2**10
"""Limit for `num_return_sequences` and `num_beams`, the rows for one prompt. Each has a key/value cache."""

MOST_NEW_TOKENS = 2**24
"""Limit for `max_new_tokens` times `num_return_sequences`. Sampling draws a number for each token in advance."""

LARGEST_LENGTH_PENALTY = 32
"""Limit for the exponent of a length. Lengths are below 2**31, so the power is finite in float64."""

_COUNTS = {
    "max_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "top_k": 0,
    "num_return_sequences": 1,
    "num_beams": 1,
}
"""Numbers of tokens and rows -> their minimum."""

_SMALLEST_FLOAT32, _LARGEST_FLOAT32 = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

_ROWS = ("num_return_sequences", "num_beams")
_FRACTIONS = ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_NEEDS_TEMPERATURE = ("top_k", *_FRACTIONS)


def problems(g: GenerationConfig, config: GPT2Config, prompts: Sequence[Sequence[int]]) -> list[str]:
    """Return one sentence for each invalid field of `g`."""
    found = [*_problems_with_numbers(g), *_problems_with_ids(g, config.vocab_size)]
    if g.num_beams > 1:
        found += _problems_with_beams(g, config)
    elif g.temperature >= 0 and g.greedy:
        found += _problems_with_greedy(g)
    return [*found, *_problems_with_prompts(g, config, prompts)]


def _problems_with_numbers(g: GenerationConfig) -> Iterator[str]:
    for name, least in _COUNTS.items():
        if (count := getattr(g, name)) is not None and count < least:
            yield f"{name}={count}: must {'be at least 1' if least else 'not be negative'}"
    if g.max_new_tokens * min(g.num_return_sequences, MOST_ROWS) > MOST_NEW_TOKENS:
        yield (
            f"max_new_tokens={g.max_new_tokens}, num_return_sequences={g.num_return_sequences}: their product must be "
            f"at most {MOST_NEW_TOKENS}"
        )
    for name in _ROWS:
        if (count := getattr(g, name)) > MOST_ROWS:
            yield f"{name}={count}: must be at most {MOST_ROWS}"
    if not 0 <= g.temperature <= _LARGEST_FLOAT32:
        yield f"temperature={g.temperature}: must be 0, for the most likely token, or positive and finite in float32"
    for name in _FRACTIONS:
        if (value := getattr(g, name)) is not None and not 0 <= value <= 1:
            yield f"{name}={value}: must be between 0 and 1"
    if g.typical_p == 0:
        yield f"typical_p={g.typical_p}: must be above 0"
    if g.repetition_penalty is not None and not _SMALLEST_FLOAT32 <= g.repetition_penalty <= _LARGEST_FLOAT32:
        yield f"repetition_penalty={g.repetition_penalty}: must be positive and finite in float32"
    if (decay := g.exponential_decay_length_penalty) is not None:
        if len(decay) != 2 or not 0 < decay[1] <= _LARGEST_FLOAT32:
            yield f"exponential_decay_length_penalty={decay}: must be a number of tokens and a positive, finite factor"
    if not abs(g.length_penalty) <= LARGEST_LENGTH_PENALTY:
        yield (
            f"length_penalty={g.length_penalty}: must be between -{LARGEST_LENGTH_PENALTY} and {LARGEST_LENGTH_PENALTY}"
        )
    if g.early_stopping not in (False, True, "never"):
        yield f"early_stopping={quoted(g.early_stopping)}: must be False, True or 'never'"
    if not 0 <= g.seed <= LARGEST_SEED:
        yield f"seed={g.seed}: must be between 0 and {LARGEST_SEED}"


def _problems_with_ids(g: GenerationConfig, vocab_size: int) -> Iterator[str]:
    lists: dict[str, Iterable[int]] = {"eos_token_id": g.eos_token_ids}
    for name in ("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"):
        if (value := getattr(g, name)) is not None:
            lists[name] = np.ravel(value).tolist()
    sequences = {
        "bad_words_ids": [*(g.bad_words_ids or ())],
        "sequence_bias": [ids for ids, _ in g.sequence_bias or ()],
    }
    for name, group in sequences.items():
        if any(len(ids) == 0 for ids in group):
            yield f"{name}: a sequence is empty"
        if len(group) * max(map(len, group), default=0) > MOST_SEQUENCE_IDS:
            yield f"{name}: {len(group)} sequences of up to {max(map(len, group))} tokens are too many"
        lists[name] = [i for ids in group for i in ids]
    if not all(abs(bias) <= _LARGEST_FLOAT32 for _, bias in g.sequence_bias or ()):
        yield "sequence_bias: a bias is not finite in float32 (use bad_words_ids to forbid a sequence)"
    for name, ids in lists.items():
        if unknown := [i for i in ids if not 0 <= i < vocab_size]:
            shown: list[Any] = unknown if len(unknown) < 10 else [*unknown[:9], "..."]
            yield f"{name}={shown}: the vocabulary is 0 to {vocab_size - 1}"
    suppressed = {*(g.suppress_tokens or ())}
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        if (forced := {*lists.get(name, ())}) and forced <= suppressed:
            yield f"{name}={sorted(forced)}: also in suppress_tokens, so no token would be left"
    if len(suppressed) >= vocab_size:
        yield "suppress_tokens: no token is left"


def _problems_with_greedy(g: GenerationConfig) -> Iterator[str]:
    for name in _NEEDS_TEMPERATURE:
        if g.active(name) is not None:
            yield f"{name}={getattr(g, name)}: has no effect without a temperature above 0"
    if g.num_return_sequences > 1:
        yield f"num_return_sequences={g.num_return_sequences}: the outputs would be equal without a temperature above 0"


def _problems_with_beams(g: GenerationConfig, config: GPT2Config) -> Iterator[str]:
    if not g.greedy:
        yield f"temperature={g.temperature}: beam search does not sample; use temperature=0 or num_beams=1"
    for name in _NEEDS_TEMPERATURE:
        if g.active(name) is not None:
            yield f"{name}={getattr(g, name)}: beam search does not sample; leave it out"
    if g.slide:
        yield "slide: beam search stays within n_positions; leave it out"
    if g.num_return_sequences > g.num_beams:
        yield f"num_return_sequences={g.num_return_sequences}: must be at most num_beams={g.num_beams}"
    if g.num_beams + len(set(g.eos_token_ids)) > config.vocab_size:
        yield f"num_beams={g.num_beams}: the vocabulary of {config.vocab_size} has fewer tokens besides eos_token_id"


def _problems_with_prompts(g: GenerationConfig, config: GPT2Config, prompts: Sequence[Sequence[int]]) -> Iterator[str]:
    if not all(len(prompt) for prompt in prompts):
        yield "the prompt is empty; give at least one token"
    total = max((len(prompt) for prompt in prompts), default=0) + max(g.max_new_tokens, 0)
    if total > config.n_positions and not g.slide:
        yield (
            f"{total} tokens with the prompt; the model has n_positions={config.n_positions}: use fewer new tokens, a "
            "shorter prompt, or slide"
        )

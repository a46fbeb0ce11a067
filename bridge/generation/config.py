"""The configuration of text generation, shared by both backends, and the random numbers for sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from bridge.config import GPT2Config
from bridge.errors import BridgeError

LARGEST_SEED = 2**32 - 1

GREEDY_BELOW = 1e-6
"""Temperatures below this are treated as 0: the other tokens would have probability 0, and dividing by a much lower
temperature would overflow float32."""


@dataclass(frozen=True)
class GenerationConfig:
    """How many tokens to generate, and how each token is selected.

    The fields have the names and meanings of Hugging Face's `GenerationConfig` where it has them. The logits processors
    apply in the order of the fields, as in Hugging Face's `generate`. None disables a processor.
    """

    max_new_tokens: int
    """Maximum number of new tokens. A row ends earlier at one of `eos_token_ids`."""
    repetition_penalty: float | None = None
    """Divide positive logits of tokens that already occurred by this, and multiply negative ones (Keskar et al. 2019).
    Above 1, such tokens are less likely."""
    temperature: float = 0.0
    """Divide the logits by this. 0 always takes the most likely token; 1 samples from the model's distribution."""
    top_k: int | None = None
    """With a temperature: sample from this many most likely tokens."""
    top_p: float | None = None
    """With a temperature: sample from the smallest set of most likely tokens whose total probability reaches this
    (Holtzman et al. 2020)."""
    min_p: float | None = None
    """With a temperature: sample from tokens with at least this fraction of the most likely token's probability
    (Nguyen et al. 2024)."""
    seed: int = 0
    """The same seed gives the same tokens. Backends differ only by rounding errors. A row does not depend on the other
    rows, so equal prompts in one call give equal texts."""
    num_return_sequences: int = 1
    """Number of outputs for each prompt."""
    eos_token_id: int | tuple[int, ...] | None = None
    """A row ends after this token, or after any of these tokens."""
    logprobs: bool = False
    """Return the log-probability of each selected token, in nats, from the logits before any processor."""
    slide: bool = False
    """When a row has used all positions of the model, continue from its last half. If False, such a length is an
    error."""
    num_beams: int = 1
    """Above 1: beam search with this many beams. The `num_return_sequences` best are returned."""
    length_penalty: float = 1.0
    """With beams: rank them by total log-probability divided by the number of new tokens to this power. Values above 0
    favour longer texts."""

    @classmethod
    def of(cls, config: GenerationConfig | None, overrides: Mapping[str, Any]) -> GenerationConfig:
        """Return `config` with some fields replaced; without `config`, a new one with these fields."""
        return cls(**overrides) if config is None else replace(config, **overrides)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """`eos_token_id` as a tuple."""
        return () if self.eos_token_id is None else tuple(np.ravel(self.eos_token_id).tolist())

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    def check(self, config: GPT2Config, prompts: Sequence[Sequence[int]]) -> None:
        """Raise a `BridgeError`, which is a `ValueError`, that names every invalid field."""
        if problems := [*_problems(self, config), *_problems_with_prompts(self, config, prompts)]:
            raise BridgeError("; ".join(problems))


def uniform_noise(config: GenerationConfig) -> Float[np.ndarray, "num_return_sequences max_new_tokens"]:
    """Return float32 numbers from [0, 1), one for each token of each output of a prompt.

    They do not depend on the prompt's index, so a row is the same alone and in a batch. They are multiples of 2**-23,
    computed from the raw output of Philox, which numpy guarantees to be stable.
    """
    keys = [np.array([config.seed, output], np.uint64) for output in range(config.num_return_sequences)]
    raw = np.stack([np.random.Philox(key=key).random_raw(config.max_new_tokens) for key in keys])
    return (raw >> np.uint64(41)).astype(np.float32) * np.float32(2.0**-23)


def _problems(g: GenerationConfig, config: GPT2Config) -> Iterator[str]:
    if g.max_new_tokens < 0:
        yield f"max_new_tokens={g.max_new_tokens}: must not be negative"
    if not (math.isfinite(g.temperature) and g.temperature >= 0):
        yield f"temperature={g.temperature}: must be 0, for the most likely token, or positive and finite"
    for name in ("top_k", "num_return_sequences", "num_beams"):
        if (count := getattr(g, name)) is not None and count < 1:
            yield f"{name}={count}: must be at least 1"
    if g.top_p is not None and not 0 < g.top_p <= 1:
        yield f"top_p={g.top_p}: must be above 0 and at most 1"
    if g.min_p is not None and not 0 <= g.min_p <= 1:
        yield f"min_p={g.min_p}: must be between 0 and 1"
    if g.repetition_penalty is not None and not (math.isfinite(g.repetition_penalty) and g.repetition_penalty > 0):
        yield f"repetition_penalty={g.repetition_penalty}: must be positive and finite"
    if not math.isfinite(g.length_penalty):
        yield f"length_penalty={g.length_penalty}: must be finite"
    if not 0 <= g.seed <= LARGEST_SEED:
        yield f"seed={g.seed}: must be between 0 and {LARGEST_SEED}"
    if unknown := [i for i in g.eos_token_ids if not 0 <= i < config.vocab_size]:
        yield f"eos_token_id={unknown}: the vocabulary is 0 to {config.vocab_size - 1}"
    if g.num_beams > 1:
        yield from _problems_with_beams(g, config)
    elif g.temperature >= 0 and g.greedy:
        for name in ("top_k", "top_p", "min_p"):
            if getattr(g, name) is not None:
                yield f"{name}={getattr(g, name)}: has no effect without a temperature above 0"
        if g.num_return_sequences > 1:
            yield (
                f"num_return_sequences={g.num_return_sequences}: the outputs would be equal without a temperature "
                "above 0"
            )


def _problems_with_beams(g: GenerationConfig, config: GPT2Config) -> Iterator[str]:
    if not g.greedy:
        yield f"temperature={g.temperature}: beam search does not sample; use temperature=0 or num_beams=1"
    for name in ("repetition_penalty", "top_k", "top_p", "min_p"):
        if getattr(g, name) is not None:
            yield f"{name}={getattr(g, name)}: beam search ranks by the model's own probabilities; leave it out"
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

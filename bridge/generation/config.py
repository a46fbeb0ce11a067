"""What may be asked of a decoder, and the random numbers that answer it: the same in both backends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bridge.config import GPT2Config
from bridge.errors import BridgeError

LARGEST_SEED = 2**32 - 1

GREEDY_BELOW = 1e-6
"""Temperatures below this take the likeliest token, as 0 does: the others' chances are nil, and float32
overflows where logits are divided by much less."""


@dataclass(frozen=True)
class GenerationConfig:
    """How far to go on, and how each token is chosen.

    The filters act in the order of the fields, as in Hugging Face's `generate`; None leaves one out.
    """

    max_new_tokens: int
    """At most so many; a row ends sooner with one of `stop_ids`."""
    repetition_penalty: float | None = None
    """Logits of tokens that the model sees are divided by it where positive, else multiplied (Keskar et al. 2019)."""
    temperature: float = 0.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: int | None = None
    """Sample among this many likeliest tokens only."""
    top_p: float | None = None
    """Sample among the fewest likeliest tokens that have this much probability together (Holtzman et al. 2020)."""
    min_p: float | None = None
    """Sample among tokens with at least this part of the likeliest one's probability (Nguyen et al. 2024)."""
    seed: int = 0
    """The same seed gives the same tokens: for a prompt alone or among others, and in both backends, up to rounding.
    The same prompt twice gives one text twice; for several texts ask for `samples`."""
    samples: int = 1
    """Continuations of each prompt, one after the other in the result."""
    stop_ids: tuple[int, ...] = ()
    """A row ends after any of these."""
    log_probs: bool = False
    """Report each chosen token's log-probability, in nats, as the model gives it: before the filters."""
    slide: bool = False
    """Where a row is as long as the model's positions, go on from its last half, instead of refusing the request."""
    beams: int = 1
    """Above 1: keep this many likeliest continuations of each prompt at every step, and give `samples` of them."""
    length_penalty: float = 1.0
    """For beams: the total log-probability is divided by the number of new tokens to this power to rank them."""

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    def check(self, config: GPT2Config, prompts: Sequence[Sequence[int]]) -> None:
        """Raise `BridgeError`, which is a `ValueError`, naming every field that cannot be honoured."""
        if problems := [*_problems(self, config), *_problems_with_prompts(self, config, prompts)]:
            raise BridgeError("; ".join(problems))


def uniform_draws(request: GenerationConfig) -> Float[np.ndarray, "samples max_new_tokens"]:
    """Float32 numbers from [0, 1), one for each token of each sample of any prompt.

    That a prompt's number is not in them makes each row what it is alone. They are multiples of 2**-23 from
    Philox, whose raw numbers numpy promises never to change.
    """
    keys = [np.array([request.seed, sample], np.uint64) for sample in range(request.samples)]
    raw = np.stack([np.random.Philox(key=key).random_raw(request.max_new_tokens) for key in keys])
    return (raw >> np.uint64(41)).astype(np.float32) * np.float32(2.0**-23)


def _problems(r: GenerationConfig, config: GPT2Config) -> Iterator[str]:
    if r.max_new_tokens < 0:
        yield f"max_new_tokens={r.max_new_tokens}: must not be negative"
    if not (math.isfinite(r.temperature) and r.temperature >= 0):
        yield f"temperature={r.temperature}: must be 0, for the likeliest token, or positive and finite"
    for name in ("top_k", "samples", "beams"):
        if (count := getattr(r, name)) is not None and count < 1:
            yield f"{name}={count}: must be at least 1"
    if r.top_p is not None and not 0 < r.top_p <= 1:
        yield f"top_p={r.top_p}: must be above 0 and at most 1"
    if r.min_p is not None and not 0 <= r.min_p <= 1:
        yield f"min_p={r.min_p}: must be between 0 and 1"
    if r.repetition_penalty is not None and not (math.isfinite(r.repetition_penalty) and r.repetition_penalty > 0):
        yield f"repetition_penalty={r.repetition_penalty}: must be positive and finite"
    if not math.isfinite(r.length_penalty):
        yield f"length_penalty={r.length_penalty}: must be finite"
    if not 0 <= r.seed <= LARGEST_SEED:
        yield f"seed={r.seed}: must be between 0 and {LARGEST_SEED}"
    if unknown := [i for i in r.stop_ids if not 0 <= i < config.vocab_size]:
        yield f"stop_ids={unknown}: the vocabulary is 0 to {config.vocab_size - 1}"
    if r.beams > 1:
        yield from _problems_with_beams(r, config)
    elif r.temperature >= 0 and r.greedy:
        for name in ("top_k", "top_p", "min_p"):
            if getattr(r, name) is not None:
                yield f"{name}={getattr(r, name)}: does nothing without a temperature above 0"
        if r.samples > 1:
            yield f"samples={r.samples}: would all be the same without a temperature above 0"


def _problems_with_beams(r: GenerationConfig, config: GPT2Config) -> Iterator[str]:
    if not r.greedy:
        yield f"temperature={r.temperature}: beams are not sampled; leave it 0, or beams 1"
    for name in ("repetition_penalty", "top_k", "top_p", "min_p"):
        if getattr(r, name) is not None:
            yield f"{name}={getattr(r, name)}: beams are ranked by the model's own probabilities; leave it out"
    if r.slide:
        yield "slide: beams are kept within n_positions; leave it out"
    if r.samples > r.beams:
        yield f"samples={r.samples}: no more than beams={r.beams}"
    if r.beams + len(set(r.stop_ids)) > config.vocab_size:
        yield f"beams={r.beams}: more than the vocabulary of {config.vocab_size} has besides stop_ids"


def _problems_with_prompts(r: GenerationConfig, config: GPT2Config, prompts: Sequence[Sequence[int]]) -> Iterator[str]:
    if not all(len(prompt) for prompt in prompts):
        yield "the prompt is empty; give at least one token to go on from"
    total = max((len(prompt) for prompt in prompts), default=0) + max(r.max_new_tokens, 0)
    if total > config.n_positions and not r.slide:
        yield (
            f"{total} tokens with the prompt; the model has n_positions={config.n_positions}: ask for fewer, "
            "shorten the prompt, or slide"
        )

"""Beam search over any backend's `Decoder`: the bookkeeping, which is the same everywhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from bridge.generation.config import GenerationConfig
from bridge.generation.decoder import Decoder, GenerationOutput, InvalidLogits, Prompts, check_ids, left_padded


@dataclass(frozen=True)
class _Beam:
    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    total: float
    """The sum of the log-probabilities."""

    def followed_by(self, token: int, log_prob: float) -> _Beam:
        return _Beam((*self.ids, token), (*self.log_probs, log_prob), self.total + log_prob)


@dataclass
class _Search:
    """The beams of one prompt: those that go on, and the best of those that ended with a stop id."""

    request: GenerationConfig
    live: list[_Beam]
    ended: list[_Beam] = field(default_factory=list)
    done: bool = False

    def rank(self, beam: _Beam) -> float:
        return beam.total / len(beam.ids) ** self.request.length_penalty

    def step(self, log_probs: Float[np.ndarray, "beams N"], ids: Int[np.ndarray, "beams N"]) -> list[int]:
        """Go on with the likeliest among the next tokens of all live beams; returns the beams that those come from."""
        width = self.request.beams
        candidates = [
            (beam.followed_by(int(token), float(log_prob)), parent)
            for parent, beam in enumerate(self.live)
            for token, log_prob in zip(ids[parent], log_probs[parent], strict=True)
        ]
        candidates.sort(key=lambda candidate: candidate[0].total, reverse=True)
        self.ended += [beam for beam, _ in candidates[:width] if self.ends(beam)]
        self.ended = sorted(self.ended, key=self.rank, reverse=True)[:width]
        going_on = [(beam, parent) for beam, parent in candidates if not self.ends(beam)][:width]
        self.live = [beam for beam, _ in going_on]
        self.done = len(self.ended) == width and self.rank(self.ended[-1]) >= self.rank(self.live[0])
        return [parent for _, parent in going_on]

    def ends(self, beam: _Beam) -> bool:
        return beam.ids[-1] in self.request.stop_ids

    def best(self) -> list[GenerationOutput]:
        """The continuations asked for, best first; beams that reached the maximum length count too."""
        found = self.ended if self.done else self.ended + self.live
        found = sorted(found, key=self.rank, reverse=True)[: self.request.samples]
        return [GenerationOutput([*beam.ids], [*beam.log_probs] if self.request.log_probs else None) for beam in found]


def beam_search(
    decoder: Decoder[Any, Any], prompts: Prompts, request: GenerationConfig
) -> list[list[GenerationOutput]]:
    """As `Decoder.generate`, for `request.beams` above 1: the likeliest texts that the search meets, best first.

    Each step keeps the `beams` likeliest continuations; those that end with a stop id are put aside. It is
    over when `beams` are aside and none of the others ranks higher (Wu et al. 2016, section 7; as in transformers
    with `early_stopping=False`).
    """
    request.check(decoder.config, prompts)
    check_ids(decoder.config, prompts)
    width, slots = request.beams, max(map(len, prompts), default=0) + request.max_new_tokens
    if len(prompts) == 0 or not request.max_new_tokens:
        return [[GenerationOutput([], [] if request.log_probs else None)] * request.samples for _ in prompts]
    candidates = width + len(set(request.stop_ids))  # of each row, so that as many as `beams` go on
    state, log_probs, ids = decoder._begin_beams(*left_padded(prompts), slots, width, candidates)
    searches = [_Search(request, [_Beam((), (), 0.0)]) for _ in prompts]
    parents = np.zeros((len(prompts), width), np.int32)
    for step in range(request.max_new_tokens):
        for b, search in enumerate(searches):
            if not search.done:
                rows = slice(b * width, b * width + len(search.live))
                if np.isnan(log_probs[rows]).any():  # which happens if and only if the logits are invalid
                    raise InvalidLogits(b * request.samples, step)
                parents[b] = search.step(log_probs[rows], ids[rows])
        if step + 1 == request.max_new_tokens or all(search.done for search in searches):
            break
        first_rows = np.arange(len(prompts), dtype=np.int32)[:, None] * width
        last = np.array([[beam.ids[-1] for beam in search.live] for search in searches], np.int32)
        state, log_probs, ids = decoder._advance_beams(state, (first_rows + parents).ravel(), last.ravel(), candidates)
    return [search.best() for search in searches]

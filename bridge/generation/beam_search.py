"""Beam search over any backend: the bookkeeping, which does not depend on the framework."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Int

from bridge.config import GPT2Config
from bridge.generation.config import GenerationConfig
from bridge.generation.output import Candidates, GenerationOutput, InvalidLogits
from bridge.generation.prompts import Prompts, check_ids, left_padded

Beams = TypeVar("Beams")


class BeamDecoder(ABC, Generic[Beams]):
    """The methods of a backend that beam search calls.

    Axes: B prompts, R rows (`num_beams` for each prompt), N candidates.
    """

    config: GPT2Config

    @abstractmethod
    def prefill_beams(
        self,
        ids: Int[np.ndarray, "B T"],
        num_padding: Int[np.ndarray, " B"],
        max_length: int,
        config: GenerationConfig,
        num_candidates: int,
    ) -> tuple[Beams, Candidates]:
        """Run the prompts and make `num_beams` rows of each.

        Returns the state of the search, and the best next tokens of each row.
        """

    @abstractmethod
    def decode_beams(
        self, beams: Beams, parents: Int[np.ndarray, " R"], tokens: Int[np.ndarray, " R"], num_candidates: int
    ) -> tuple[Beams, Candidates]:
        """Make new rows: row r is a copy of row `parents[r]` with `tokens[r]` appended.

        Returns the same as `prefill_beams`, for the new rows.
        """


@dataclass(frozen=True)
class _Beam:
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    total: float
    """The sum of the scores. Without processors they are `logprobs`."""

    def followed_by(self, token: int, score: float, logprob: float) -> _Beam:
        return _Beam((*self.ids, token), (*self.logprobs, logprob), self.total + score)


@dataclass
class _Search:
    """The beams of one prompt: the live ones, and the best of those that ended with an end-of-sequence token."""

    config: GenerationConfig
    live: list[_Beam]
    ended: list[_Beam] = field(default_factory=list)
    done: bool = False

    def rank(self, beam: _Beam, length: int | None = None) -> float:
        """Return the total divided by a power of the length. `length` defaults to the beam's own length."""
        return beam.total / (length or len(beam.ids)) ** self.config.length_penalty

    def step(self, rows: Candidates) -> list[int]:
        """Extend the beams by the best of all candidate tokens. Returns the parent of each new live beam.

        Candidates with equal totals are ordered by beam, the better one first, and then by token id.
        """
        width = self.config.num_beams
        totals = np.array([beam.total for beam in self.live])[:, None] + rows.scores
        live: list[_Beam] = []
        parents: list[int] = []
        for place, best in enumerate(np.argsort(-totals, axis=None, kind="stable").tolist()):
            if place >= width and len(live) == width:
                break
            parent, n = divmod(best, totals.shape[1])
            token, score, logprob = (column[parent, n].item() for column in rows)
            beam = self.live[parent].followed_by(token, score, logprob)
            if not self.has_ended(beam):
                live.append(beam)
                parents.append(parent)
            elif place < width:
                self.ended.append(beam)
        self.ended = sorted(self.ended, key=self.rank, reverse=True)[:width]
        self.live = live
        self.done = len(self.ended) == width and self.is_final()
        return parents

    def is_final(self) -> bool:
        """Whether the search ends, given that `num_beams` beams have ended."""
        stopping, longest = self.config.early_stopping, None
        if stopping == "never" and self.config.length_penalty > 0:
            longest = self.config.max_new_tokens
        return stopping is True or self.rank(self.ended[-1]) >= self.rank(self.live[0], longest)

    def has_ended(self, beam: _Beam) -> bool:
        return beam.ids[-1] in self.config.eos_token_ids

    def best(self) -> list[GenerationOutput]:
        """Return the outputs, best first. Unless the search ended early, live beams are candidates too."""
        found = self.ended if self.done else self.ended + self.live
        found = sorted(found, key=self.rank, reverse=True)[: self.config.num_return_sequences]
        return [GenerationOutput([*beam.ids], [*beam.logprobs] if self.config.logprobs else None) for beam in found]


def beam_search(
    decoder: BeamDecoder[Beams], prompts: Prompts, config: GenerationConfig
) -> list[list[GenerationOutput]]:
    """Return the best continuations of each prompt, best first, for `config.num_beams` above 1.

    Each step keeps the `num_beams` most likely continuations and sets aside those that end with an end-of-sequence
    token. The search ends when `num_beams` are set aside and, depending on `early_stopping`, no other beam ranks higher
    (Wu et al. 2016, section 7). As in transformers, beams are ranked by the log-probabilities after the processors.

    Raises the same errors as `Decoder.generate`.
    """
    config.check(decoder.config, prompts)
    check_ids(decoder.config, prompts)
    width, max_length = config.num_beams, max(map(len, prompts), default=0) + config.max_new_tokens
    if len(prompts) == 0 or not config.max_new_tokens:
        return [[GenerationOutput([], [] if config.logprobs else None)] * config.num_return_sequences for _ in prompts]
    num_candidates = width + len(set(config.eos_token_ids))  # at least `num_beams` of them do not end the row
    beams, found = decoder.prefill_beams(*left_padded(prompts), max_length, config, num_candidates)
    searches = [_Search(config, [_Beam((), (), 0.0)]) for _ in prompts]
    parents = np.zeros((len(prompts), width), np.int32)
    for step in range(config.max_new_tokens):
        for b, search in enumerate(searches):
            if not search.done:
                rows = Candidates(*(column[b * width : b * width + len(search.live)] for column in found))
                if np.isnan(rows.logprobs).any():
                    raise InvalidLogits(b * config.num_return_sequences, step)
                parents[b] = search.step(rows)
        if step + 1 == config.max_new_tokens or all(search.done for search in searches):
            break
        first_rows = np.arange(len(prompts), dtype=np.int32)[:, None] * width
        last = np.array([[beam.ids[-1] for beam in search.live] for search in searches], np.int32)
        beams, found = decoder.decode_beams(beams, (first_rows + parents).ravel(), last.ravel(), num_candidates)
    return [search.best() for search in searches]

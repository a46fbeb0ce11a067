"""Shared code of the decoders of both backends: padding of prompts and scheduling of model calls.

A backend subclasses `Decoder` and adds its model: prefill of a prompt, and decoding of one token after another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Float, Int

from bridge.config import GPT2Config
from bridge.errors import BridgeError
from bridge.generation.config import GenerationConfig, uniform_draws

Prompts = Sequence[Sequence[int]]
State = TypeVar("State")
Beams = TypeVar("Beams")

ENDED = -1
"""Fills a chunk after the end of a row."""

INVALID = -2
"""Replaces a token that cannot be chosen because a logit is NaN or +inf, or all are -inf. It ends every row. The device
writes it, so that the host does not have to wait for every token."""


class InvalidLogits(BridgeError):
    """A model's logits are NaN or infinite, so no next token can be chosen."""

    def __init__(self, row: int, step: int) -> None:
        super().__init__(
            f"row {row}, new token {step}, counted from 0: the model's logits are NaN or infinite; look for weights "
            "that are not finite (`gpt2 inspect` names them), or compute in float32 if bfloat16 or float16 overflows"
        )
        self.row, self.step = row, step


@dataclass(frozen=True)
class GenerationOutput:
    """One continuation of a prompt."""

    ids: list[int]
    """New tokens only; the last may be one of the request's `stop_ids`."""
    log_probs: list[float] | None = None
    """The log-probability of each token, in nats, if requested."""


@dataclass(frozen=True)
class Chunk:
    """The next tokens of every row."""

    ids: Int[np.ndarray, "rows new"]
    """`ENDED` after a row's last token."""
    log_probs: Float[np.ndarray, "rows new"] | None


class Decoder(ABC, Generic[State, Beams]):
    """Continues prompts of different lengths. Each row equals that of a single prompt, except for rounding errors."""

    config: GPT2Config

    def generate(self, prompts: Prompts, request: GenerationConfig) -> list[list[GenerationOutput]]:
        """Return `request.samples` continuations for each prompt. A prompt is a list of token ids.

        Raises:
            BridgeError: the request is invalid or the model cannot fulfil it. A subclass of `ValueError`.
            InvalidLogits: a logit is NaN or infinite. A subclass of `BridgeError`.
            IndexError: an id is outside the vocabulary.
        """
        if request.beams > 1:
            from bridge.generation.beam_search import beam_search

            return beam_search(self, prompts, request)
        rows: list[GenerationOutput] = [
            GenerationOutput([], [] if request.log_probs else None) for _ in range(len(prompts) * request.samples)
        ]
        for chunk in self.stream(prompts, request):
            for r, row in enumerate(rows):
                new = chunk.ids[r] != ENDED
                row.ids.extend(chunk.ids[r][new].tolist())
                if row.log_probs is not None and chunk.log_probs is not None:
                    row.log_probs.extend(chunk.log_probs[r][new].tolist())
        return [rows[i : i + request.samples] for i in range(0, len(rows), request.samples)]

    def stream(self, prompts: Prompts, request: GenerationConfig, at_a_time: int | None = None) -> Iterator[Chunk]:
        """Yield the same tokens in chunks of `at_a_time` steps; by default, as many as fit into the positions.

        The rows of a chunk are the samples of the first prompt, then of the second, and so on.
        """
        if request.beams > 1:
            raise ValueError("beams are known at the end only; use generate")
        request.check(self.config, prompts)
        check_ids(self.config, prompts)
        return self._stream([[*prompt] for prompt in prompts], request, at_a_time)

    def _stream(self, prompts: list[list[int]], request: GenerationConfig, at_a_time: int | None) -> Iterator[Chunk]:
        rows, draws = prompts, np.tile(uniform_draws(request), (len(prompts), 1))
        made, copies, ended = 0, request.samples, np.zeros(len(draws), bool)
        while made < request.max_new_tokens and not ended.all():
            rows = [self._within_positions(row) for row in rows]
            if made:  # finished rows must not extend the padded length
                rows = [row[-1:] if over else row for row, over in zip(rows, ended, strict=True)]
            longest = max(map(len, rows))
            last = min(request.max_new_tokens, made + self.config.n_positions - longest)
            state = self._begin(*left_padded(rows), longest + last - made, request, draws[:, made:last], ended, copies)
            rows, copies = [[*row] for row in rows for _ in range(copies)], 1
            first, n = made, 1
            while True:
                chunk = self._made(state, made - first, n)
                if len(invalid := np.argwhere(chunk.ids == INVALID)):
                    r, step = invalid[0].tolist()
                    raise InvalidLogits(r, made + step)
                for row, ids in zip(rows, chunk.ids, strict=True):
                    row.extend(ids[ids != ENDED].tolist())
                ended = np.isin(chunk.ids[:, -1], [ENDED, *request.stop_ids])
                yield chunk
                made += n
                n = min(at_a_time or last, last - made)
                if n < 1 or ended.all():
                    break
                state = self._advance(state, n)

    def _within_positions(self, row: list[int]) -> list[int]:
        P = self.config.n_positions
        return row if len(row) < P else row[-max(1, P // 2) :]

    @abstractmethod
    def _begin(
        self,
        ids: Int[np.ndarray, "B T"],
        padding: Int[np.ndarray, " B"],
        slots: int,
        request: GenerationConfig,
        draws: Float[np.ndarray, "B*copies new"],
        ended: np.ndarray,
        copies: int,
    ) -> State:
        """Prefill the prompts and choose the first token of each copy.

        `padding`: number of padding ids at the start of each row; `slots`: maximum tokens per row; `draws`: a random
        number for each token; `ended`: rows that get no more tokens.
        """

    @abstractmethod
    def _advance(self, state: State, steps: int) -> State:
        """Choose `steps` more tokens, or fewer if all rows end earlier."""

    @abstractmethod
    def _made(self, state: State, first: int, number: int) -> Chunk:
        """Return the tokens chosen since `_begin`, from number `first` on."""

    @abstractmethod
    def _begin_beams(
        self, ids: Int[np.ndarray, "B T"], padding: Int[np.ndarray, " B"], slots: int, beams: int, candidates: int
    ) -> tuple[Beams, Float[np.ndarray, "R N"], Int[np.ndarray, "R N"]]:
        """Prefill the prompts, make `beams` rows of each, and return each row's `candidates` likeliest next tokens."""

    @abstractmethod
    def _advance_beams(
        self, state: Beams, parents: Int[np.ndarray, " R"], tokens: Int[np.ndarray, " R"], candidates: int
    ) -> tuple[Beams, Float[np.ndarray, "R N"], Int[np.ndarray, "R N"]]:
        """Append a token to each of the rows `parents`, and return each new row's likeliest next tokens."""


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Return the rows as one left-padded array, and the number of padding ids in each row."""
    longest = max(map(len, rows))
    ids = np.zeros((len(rows), longest), np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[longest - len(tokens) :] = tokens
    return ids, np.array([longest - len(row) for row in rows], np.int32)


def with_continuations(
    prompts: Int[np.ndarray, "B T"], found: Sequence[Sequence[GenerationOutput]], request: GenerationConfig
) -> Int[np.ndarray, "B*samples T+new"]:
    """Return prompts and continuations as one array. Finished rows are filled with the first stop id."""
    rows = [(prompt, c.ids) for prompt, continuations in zip(prompts, found, strict=True) for c in continuations]
    filler = request.stop_ids[0] if request.stop_ids else 0
    dtype = np.promote_types(prompts.dtype, np.int32)  # prompts may come in bytes
    ids = np.full((len(rows), prompts.shape[1] + request.max_new_tokens), filler, dtype)
    for row, (prompt, new) in zip(ids, rows, strict=True):
        row[: len(prompt)] = prompt
        row[len(prompt) : len(prompt) + len(new)] = new
    return ids


def check_ids(config: GPT2Config, prompts: Prompts) -> None:
    """Raise `IndexError` for ids outside the vocabulary."""
    ids = [i for prompt in prompts for i in prompt]
    if ids and not 0 <= min(ids) <= max(ids) < config.vocab_size:
        raise IndexError(f"token ids from {min(ids)} to {max(ids)}; the vocabulary is 0 to {config.vocab_size - 1}")

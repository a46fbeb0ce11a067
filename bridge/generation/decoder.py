"""The decoder: the loop over tokens that both backends share.

A backend subclasses `Decoder` and adds its model: prefill of the prompts, decoding of one token after another, and the
scores of given tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from bridge.config import GPT2Config
from bridge.evaluation.labels import LabelScores
from bridge.generation.beam_search import BeamDecoder, beam_search
from bridge.generation.config import GenerationConfig, uniform_noise
from bridge.generation.output import ENDED, INVALID, Chunk, GenerationOutput, InvalidLogits
from bridge.generation.prompts import Prompts, check_ids, left_padded

State = TypeVar("State")
Beams = TypeVar("Beams")


class Decoder(BeamDecoder[Beams], Generic[State, Beams]):
    """Generates from prompts of different lengths. A row does not depend on the other rows, except for rounding."""

    config: GPT2Config

    def generate(self, prompts: Prompts, generation_config: GenerationConfig) -> list[list[GenerationOutput]]:
        """Return `num_return_sequences` outputs for each prompt. A prompt is a list of token ids.

        Raises:
            BridgeError: the configuration is invalid, or the model does not support it. A subclass of `ValueError`.
            InvalidLogits: a logit is NaN or infinite. A subclass of `BridgeError`.
            IndexError: an id is outside the vocabulary.
        """
        if generation_config.num_beams > 1:
            return beam_search(self, prompts, generation_config)
        n = generation_config.num_return_sequences
        rows = [GenerationOutput([], [] if generation_config.logprobs else None) for _ in range(len(prompts) * n)]
        for chunk in self.stream(prompts, generation_config):
            for r, row in enumerate(rows):
                new = chunk.ids[r] != ENDED
                row.ids.extend(chunk.ids[r][new].tolist())
                if row.logprobs is not None and chunk.logprobs is not None:
                    row.logprobs.extend(chunk.logprobs[r][new].tolist())
        return [rows[i : i + n] for i in range(0, len(rows), n)]

    def stream(
        self, prompts: Prompts, generation_config: GenerationConfig, chunk_size: int | None = None
    ) -> Iterator[Chunk]:
        """Yield the tokens of `generate` in chunks.

        The rows of a chunk are the outputs of the first prompt, then of the second, and so on. The first chunk has one
        token per row.

        Args:
            chunk_size: the number of tokens per row in a chunk; by default, as many as fit into the positions.

        Raises the same errors as `generate`, and `ValueError` for beam search, which selects tokens only at its end.
        """
        if generation_config.num_beams > 1:
            raise ValueError("beam search selects tokens only at its end; use generate instead of stream")
        generation_config.check(self.config, prompts)
        check_ids(self.config, prompts)
        return self._stream([[*prompt] for prompt in prompts], generation_config, chunk_size)

    def _stream(self, rows: list[list[int]], config: GenerationConfig, chunk_size: int | None) -> Iterator[Chunk]:
        noise = np.tile(uniform_noise(config), (len(rows), 1))
        done, copies, ended = 0, config.num_return_sequences, np.zeros(len(noise), bool)
        while done < config.max_new_tokens and not ended.all():  # one iteration, and one more after each slide
            rows = [self._within_positions(row) for row in rows]
            if done:  # finished rows must not extend the padded length
                rows = [row[-1:] if is_over else row for row, is_over in zip(rows, ended, strict=True)]
            longest = max(map(len, rows))
            last = min(config.max_new_tokens, done + self.config.n_positions - longest)
            rest, max_length = config.after(done), longest + last - done
            state = self._prefill(*left_padded(rows), max_length, rest, noise[:, done:last], ended, copies)
            rows, copies = [[*row] for row in rows for _ in range(copies)], 1
            first, n = done, 1
            while True:
                chunk = self._chunk(state, done - first, n)
                if len(invalid := np.argwhere(chunk.ids == INVALID)):
                    r, step = invalid[0].tolist()
                    raise InvalidLogits(r, done + step)
                for row, ids in zip(rows, chunk.ids, strict=True):
                    row.extend(ids[ids != ENDED].tolist())
                ended = np.isin(chunk.ids[:, -1], [ENDED, *config.eos_token_ids])
                yield chunk
                done += n
                n = min(chunk_size or last, last - done)
                if n < 1 or ended.all():
                    break
                state = self._decode(state, n)

    def _within_positions(self, row: list[int]) -> list[int]:
        P = self.config.n_positions
        return row if len(row) < P else row[-max(1, P // 2) :]

    @abstractmethod
    def score_labels(self, ids: Int[np.ndarray, "B T"], labels: Int[np.ndarray, "B T"]) -> LabelScores:
        """Return how well the model predicts the label of each position from the ids up to it, with ranks.

        Args:
            ids: input ids, padded on the right with any ids.
            labels: a token, or `IGNORE_INDEX` where no score is needed.
        """

    @abstractmethod
    def _prefill(
        self,
        ids: Int[np.ndarray, "B T"],
        num_padding: Int[np.ndarray, " B"],
        max_length: int,
        generation_config: GenerationConfig,
        noise: Float[np.ndarray, "B*copies N"],
        ended: Bool[np.ndarray, " B*copies"],
        copies: int,
    ) -> State:
        """Run the prompts, make `copies` rows of each, and select the first token of each row.

        Args:
            ids: left-padded prompts.
            num_padding: the number of padding ids at the start of each row.
            max_length: the maximum number of ids per row, padding and new tokens included.
            noise: a number from [0, 1) for each new token.
            ended: rows that get no more tokens.
        """

    @abstractmethod
    def _decode(self, state: State, steps: int) -> State:
        """Select `steps` more tokens in each row, or fewer if all rows end earlier."""

    @abstractmethod
    def _chunk(self, state: State, first: int, count: int) -> Chunk:
        """Return `count` tokens of each row, starting with token `first`, counted from the last `_prefill`."""

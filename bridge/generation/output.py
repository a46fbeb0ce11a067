"""What generation returns: the new tokens of a row, whole or in chunks, and the error for invalid logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from bridge.errors import BridgeError
from bridge.generation.config import GenerationConfig

ENDED = -1
"""Fills a chunk after the end of a row."""

INVALID = -2
"""Replaces a token that cannot be selected because a logit is NaN or +inf, or all are -inf. It ends every row. The
device writes it, so that the host does not have to wait for every token."""


class InvalidLogits(BridgeError):
    """A model's logits are NaN or infinite, or every token was removed, so no next token can be selected."""

    def __init__(self, row: int, step: int) -> None:
        super().__init__(
            f"row {row}, new token {step}, counted from 0: the model's logits are NaN or infinite, or the processors "
            "removed every token; look for weights that are not finite (`gpt2 inspect` names them), compute in float32 "
            "if bfloat16 or float16 overflows, or forbid fewer tokens"
        )
        self.row: int = row
        self.step: int = step


@dataclass(frozen=True)
class GenerationOutput:
    """One continuation of a prompt."""

    ids: list[int]
    """New tokens only. The last may be one of `GenerationConfig.eos_token_ids`."""
    logprobs: list[float] | None = None
    """The log-probability of each token, in nats, if requested."""


@dataclass(frozen=True)
class Chunk:
    """The next tokens of every row."""

    ids: Int[np.ndarray, "rows new"]
    """`ENDED` after a row's last token."""
    logprobs: Float[np.ndarray, "rows new"] | None


class Candidates(NamedTuple):
    """The best next tokens of each row in beam search, best first."""

    ids: Int[np.ndarray, "R N"]
    scores: Float[np.ndarray, "R N"]
    """The log-probabilities after the processors."""
    logprobs: Float[np.ndarray, "R N"]
    """The log-probabilities from the logits before any processor. NaN if and only if the logits are invalid."""


def concatenate(
    prompts: Int[np.ndarray, "B T"], outputs: Sequence[Sequence[GenerationOutput]], config: GenerationConfig
) -> Int[np.ndarray, "B*num_return_sequences T+new"]:
    """Return prompts and outputs as one array. Rows that ended early are filled with the first of `eos_token_ids`."""
    rows = [(prompt, output.ids) for prompt, each in zip(prompts, outputs, strict=True) for output in each]
    filler = config.eos_token_ids[0] if config.eos_token_ids else 0
    dtype = np.promote_types(prompts.dtype, np.int32)  # prompts may be uint8
    ids = np.full((len(rows), prompts.shape[1] + config.max_new_tokens), filler, dtype)
    for row, (prompt, new) in zip(ids, rows, strict=True):
        row[: len(prompt)] = prompt
        row[len(prompt) : len(prompt) + len(new)] = new
    return ids

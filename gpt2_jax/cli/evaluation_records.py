"""The records of `gpt2 eval --per-document` and `--per-token`: one JSON object per line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Int

from bridge.evaluation import TokenScores, document_scores
from bridge.tokenizers.tokenizer import Tokenizer
from gpt2_jax.cli.evaluated_text import Text


def document_records(text: Text, scores: TokenScores, document_ends: Int[np.ndarray, " D"]) -> Iterator[dict[str, Any]]:
    """Yield the score of each document."""
    for k, score in enumerate(document_scores(scores, document_ends)):
        yield {
            "document": k,
            "name": None if text.names is None else text.names[k],
            "tokens": score.tokens,
            "predicted_tokens": score.predicted_tokens,
            "nats": score.nats,
            "loss": score.loss,
            "perplexity": None if score.perplexity == math.inf else score.perplexity,
        }


def token_records(text: Text, scores: TokenScores, tokenizer: Tokenizer | None) -> Iterator[dict[str, Any]]:
    """Yield each token with its log-probability and rank, which are None if the token is not predicted.

    Args:
        tokenizer: decodes each token. If None, the records have no text.
    """
    ends = text.document_ends
    documents = None if ends is None else np.searchsorted(ends, np.arange(text.ids.size), side="right")

    @cache
    def spelled(id: int) -> str | None:
        return None if tokenizer is None else tokenizer.decode([id])

    for position, id in enumerate(text.ids.tolist()):
        rank = int(scores.ranks[position])
        yield {
            "document": None if documents is None else int(documents[position]),
            "position": position,
            "id": id,
            "text": spelled(id),
            "logprob": -float(scores.nats[position]) if rank else None,
            "rank": rank or None,
        }

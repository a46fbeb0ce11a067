"""The log-probability of continuations, over any backend's `Decoder`.

Pairs are tokenized and truncated as in EleutherAI's lm-evaluation-harness (`lm_eval.api.model.TemplateLM`), so that
results can be compared with published ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from bridge.errors import BridgeError, NoTokenizerError, quoted
from bridge.evaluation.labels import IGNORE_INDEX, TOKENS_PER_BATCH
from bridge.evaluation.windows import Progress
from bridge.generation.decoder import Decoder
from bridge.generation.prompts import check_ids
from bridge.tokenizers.tokenizer import SpecialTokenPolicy, Tokenizer

Pair = tuple[str | Sequence[int], str | Sequence[int]]
"""A context and its continuation: two texts, or two lists of ids."""


@dataclass(frozen=True)
class LogLikelihood:
    """How likely a continuation is after its context."""

    logprob: float
    """The sum of ln p over the tokens of the continuation, in nats."""
    is_greedy: bool
    """Whether each token is the most likely one, so that greedy decoding would generate the continuation."""
    num_tokens: int
    """The number of tokens of the continuation."""
    num_truncated: int = 0
    """The number of tokens removed from the start of the context, because the pair exceeds `n_positions` + 1 tokens."""


def loglikelihood(
    decoder: Decoder[Any, Any],
    pairs: Sequence[Pair],
    tokenizer: Tokenizer | None = None,
    *,
    special_tokens: SpecialTokenPolicy = "match",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> list[LogLikelihood]:
    """Return the log-probability of each continuation given its context.

    White space at the end of a context belongs to the continuation. Both texts are tokenized together and then split.
    An empty context is replaced by the tokenizer's beginning-of-sequence token or, if there is none, by its
    end-of-sequence token. If a pair is too long, its context is truncated on the left.

    Args:
        pairs: contexts and continuations, as texts or as ids.
        tokenizer: the tokenizer. Required for texts.
        special_tokens: what to do where a text contains an added token; see `Tokenizer.encode`.
        batch_size: pairs per batch. Default: about `TOKENS_PER_BATCH` tokens.
        progress: called after each batch with the number of finished pairs and of all pairs.

    Raises:
        BridgeError: a continuation has no token, or more tokens than the model's positions, or a logit is NaN.
        NoTokenizerError: there is a text and no tokenizer. A subclass of `BridgeError`.
        IndexError: an id is outside the vocabulary.
    """
    requests = [_request(decoder, tokenizer, special_tokens, *pair, k) for k, pair in enumerate(pairs)]
    check_ids(decoder.config, [[*request.ids, *request.labels[-1:]] for request in requests])
    found: dict[int, LogLikelihood] = {}
    for batch in _batches(requests, batch_size):
        nats_BT, ranks_BT = decoder.score_labels(*_padded([requests[k] for k in batch]))
        assert ranks_BT is not None
        for row, k in enumerate(batch):
            own = slice(len(requests[k].ids) - requests[k].num_tokens, len(requests[k].ids))
            nats, ranks = nats_BT[row, own], ranks_BT[row, own]
            if not np.isfinite(nats).all():
                raise BridgeError(
                    f"pair {k}: the model's log-probabilities are not finite; look for weights that are not finite "
                    "(`gpt2 inspect` names them), or compute in float32 if bfloat16 or float16 overflows"
                )
            logprob = -float(nats.sum(dtype=np.float64))
            found[k] = LogLikelihood(logprob, bool((ranks == 1).all()), len(nats), requests[k].num_truncated)
        if progress is not None:
            progress(len(found), len(requests))
    return [found[k] for k in range(len(requests))]


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, special_tokens: SpecialTokenPolicy = "match"
) -> tuple[list[int], list[int]]:
    """Return the ids of a context and its continuation, as `loglikelihood` tokenizes them.

    >>> encode_pair(byte_tokenizer(), "1 + 1 = ", "2")
    ([49, 32, 43, 32, 49, 32, 61], [32, 50])
    """
    whole, context = context + continuation, context.rstrip()
    if not context:
        ids = tokenizer.encode(whole, special_tokens=special_tokens, add_special_tokens=False)
        prefix = prefix_token_id(tokenizer)
        return (ids[:1], ids[1:]) if ids[:1] == [prefix] else ([prefix], ids)
    start = encode_text(tokenizer, context, special_tokens)
    return start, encode_text(tokenizer, whole, special_tokens)[len(start) :]


def encode_text(tokenizer: Tokenizer, text: str, special_tokens: SpecialTokenPolicy = "match") -> list[int]:
    """Return the ids of a text. Special tokens are added around it, unless it begins with the prefix token."""
    begins = bool(tokenizer.around[0]) and text.startswith(tokenizer.decode([prefix_token_id(tokenizer)]))
    return tokenizer.encode(text, special_tokens=special_tokens, add_special_tokens=not begins)


def prefix_token_id(tokenizer: Tokenizer) -> int:
    """Return the token that replaces an empty context.

    It is the beginning-of-sequence token or, if there is none, the end-of-sequence token. Raises `BridgeError` if the
    tokenizer has neither.
    """
    for token in (tokenizer.special.bos, tokenizer.special.eos):
        if token is not None and (found := tokenizer.id_of(token)) is not None:
            return found
    raise BridgeError(
        f"the tokenizer {quoted(tokenizer.name)} has no beginning-of-sequence and no end-of-sequence token to "
        "replace an empty context; give a context"
    )


@dataclass(frozen=True)
class _Request:
    """The input ids of a pair, and the label of each of its last `num_tokens` positions."""

    ids: list[int]
    labels: list[int]
    num_tokens: int
    num_truncated: int


def _request(
    decoder: Decoder[Any, Any],
    tokenizer: Tokenizer | None,
    special_tokens: SpecialTokenPolicy,
    context: str | Sequence[int],
    continuation: str | Sequence[int],
    k: int,
) -> _Request:
    if isinstance(context, str) and isinstance(continuation, str):
        if tokenizer is None:
            raise NoTokenizerError(f"pair {k}: it is a text; give the tokenizer, or give two lists of ids")
        context, continuation = encode_pair(tokenizer, context, continuation, special_tokens)
    elif isinstance(context, str) or isinstance(continuation, str):
        raise BridgeError(f"pair {k}: give two texts or two lists of ids, not one of each")
    P = decoder.config.n_positions
    if not context or not continuation:
        what = "continuation" if context else "context"
        raise BridgeError(f"pair {k}: the {what} has no token; give at least one")
    if len(continuation) > P:
        raise BridgeError(
            f"pair {k}: the continuation has {len(continuation)} tokens, and the model has n_positions={P}; shorten it"
        )
    whole = [*context, *continuation]
    kept = whole[-(P + 1) :]
    return _Request(kept[:-1], kept[1:], len(continuation), len(whole) - len(kept))


def _batches(requests: Sequence[_Request], batch_size: int | None) -> Iterator[list[int]]:
    """Yield the indices of the requests in batches of similar lengths, longest first."""
    if batch_size is not None and batch_size < 1:
        raise BridgeError(f"batch_size={batch_size}: must be at least 1")
    order = sorted(range(len(requests)), key=lambda k: -len(requests[k].ids))
    while order:
        size = batch_size or max(1, TOKENS_PER_BATCH // len(requests[order[0]].ids))
        yield order[:size]
        order = order[size:]


def _padded(requests: Sequence[_Request]) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Return input ids and labels, padded on the right. Only the tokens of continuations have labels."""
    longest = max(len(request.ids) for request in requests)
    ids_BT = np.zeros((len(requests), longest), np.int32)
    labels_BT = np.full_like(ids_BT, IGNORE_INDEX)
    for ids, labels, request in zip(ids_BT, labels_BT, requests, strict=True):
        ids[: len(request.ids)] = request.ids
        labels[len(request.ids) - request.num_tokens : len(request.ids)] = request.labels[-request.num_tokens :]
    return ids_BT, labels_BT

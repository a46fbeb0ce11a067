"""The tokens of pairs, their batches and their errors, with a decoder that has no model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from support.models import TINY
from support.tokenizers_for_tests import of_tiktoken

import bridge
from bridge import (
    IGNORE_INDEX,
    AddedToken,
    BridgeError,
    LogLikelihood,
    NoTokenizerError,
    SpecialTokens,
    loglikelihood,
)
from bridge.evaluation import LabelScores
from bridge.generation.decoder import Decoder
from bridge.generation.scoring import encode_pair
from bridge.tokenizers.byte_level_bpe import WORDS, ByteLevelBPE
from bridge.tokenizers.tokenizer import Tokenizer

BYTES = bridge.byte_tokenizer()
END = 256
CONFIG = replace(TINY, n_positions=8)


@dataclass
class Listed(Decoder[Any, Any]):
    """Token i has the log-probability -i/4 after any token, and is the most likely one if the token before is i - 1."""

    config: bridge.GPT2Config = CONFIG
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def score_labels(self, ids: np.ndarray, labels: np.ndarray) -> LabelScores:
        self.shapes.append(ids.shape)
        is_label = labels != IGNORE_INDEX
        return LabelScores(np.where(is_label, labels / 4, 0), np.where(is_label, 1 + (labels != ids + 1), 0))

    def _prefill(self, *_: Any) -> Any:
        raise NotImplementedError

    _decode = _chunk = prefill_beams = decode_beams = _prefill


def test_only_the_tokens_of_the_continuation_are_scored() -> None:
    found = loglikelihood(Listed(), [([5, 6], [7, 8]), ([5], [9]), ([5, 9], [10])])
    assert found == [LogLikelihood(-15 / 4, True, 2), LogLikelihood(-9 / 4, False, 1), LogLikelihood(-10 / 4, True, 1)]


def test_one_token_that_is_not_the_most_likely_makes_the_continuation_not_greedy() -> None:
    assert [one.is_greedy for one in loglikelihood(Listed(), [([1], [2, 3, 5]), ([1], [3, 4, 5])])] == [False, False]


def test_a_long_context_is_truncated_on_the_left() -> None:
    """As in lm-evaluation-harness, `n_positions` + 1 tokens remain, because the last one is not an input."""
    decoder = Listed()
    found = loglikelihood(decoder, [([*range(10)], [10, 11]), ([*range(7)], [7, 8])])
    assert [one.num_truncated for one in found] == [3, 0]
    assert [one.logprob for one in found] == [-21 / 4, -15 / 4]
    assert decoder.shapes == [(2, 8)]


def test_a_continuation_may_fill_all_positions() -> None:
    [found] = loglikelihood(Listed(), [([1, 0], [*range(1, 9)])])
    assert found == LogLikelihood(-9.0, True, 8, 1)


def test_batches_have_similar_lengths_and_results_the_order_of_the_pairs() -> None:
    decoder, calls = Listed(), []
    pairs = [([1] * n, [n]) for n in (1, 7, 3, 6, 2)]
    found = loglikelihood(decoder, pairs, batch_size=2, progress=lambda *call: calls.append(call))
    assert [one.logprob for one in found] == [-n / 4 for n in (1, 7, 3, 6, 2)]
    assert decoder.shapes == [(2, 7), (2, 3), (1, 1)]
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_there_may_be_no_pair() -> None:
    assert loglikelihood(Listed(), []) == []


def test_texts_are_tokenized_as_pairs() -> None:
    pairs = [("ab", "cd"), ("", "x"), ([97, 98], [99, 100])]
    texts, empty, ids = loglikelihood(Listed(), pairs, BYTES)
    assert texts == ids == LogLikelihood(-199 / 4, True, 2)
    assert empty == LogLikelihood(-120 / 4, False, 1)  # after the end of text


@pytest.fixture(scope="module")
def merging() -> Tokenizer:
    """Byte-level BPE in which `ab` and ` c` are one token."""
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 257, b" c": 258}
    return of_tiktoken("merging", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": END})


PAIRS = {
    "the parts": (("ab", " c"), ([257], [258])),
    "a space at the end of the context": (("ab ", "c"), ([257], [258])),
    "a token across the border": (("a", "b c"), ([97], [258])),
    "white space alone": ((" ", "c"), ([END], [258])),
    "no context": (("", "ab"), ([END], [257])),
    "a continuation that begins with the end of text": (("", "<|endoftext|>ab"), ([END], [257])),
}
"""(context, continuation) -> their ids. After a token across the border, the harness also loses the second letter."""


@pytest.mark.parametrize("why", PAIRS)
def test_pairs_are_encoded_together(why: str, merging: Tokenizer) -> None:
    pair, expected = PAIRS[why]
    assert encode_pair(merging, *pair) == expected


def test_a_beginning_of_sequence_token_is_added_once() -> None:
    ranks, end = {bytes([b]): b for b in range(256)}, AddedToken("<s>", END)
    tokenizer = ByteLevelBPE("with <s>", ranks, [end], SpecialTokens("<s>", "<s>"), around=([END], []))
    assert encode_pair(tokenizer, "a", "b") == encode_pair(tokenizer, "<s>a", "b") == ([END, 97], [98])
    assert encode_pair(tokenizer, "", "b") == ([END], [98])


REFUSED = {
    "no continuation": ([([1], [])], "pair 0: the continuation has no token"),
    "no context": ([([1], [2]), ([], [1])], "pair 1: the context has no token"),
    "too long": ([([1], [*range(9)])], "pair 0: the continuation has 9 tokens.*n_positions=8"),
    "a text and ids": ([("a", [1])], "pair 0: give two texts or two lists"),
    "nothing left of the continuation": ([("a", "")], "pair 0: the continuation has no token"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_pairs_that_cannot_be_scored_are_refused(why: str) -> None:
    pairs, message = REFUSED[why]
    with pytest.raises(BridgeError, match=message):
        loglikelihood(Listed(), pairs, BYTES)


def test_texts_need_a_tokenizer() -> None:
    with pytest.raises(NoTokenizerError, match=r"pair 0.*give the tokenizer"):
        loglikelihood(Listed(), [("a", "b")])


def test_an_empty_context_needs_a_token_before_a_text() -> None:
    with pytest.raises(BridgeError, match="no beginning-of-sequence"):
        loglikelihood(Listed(), [("", "b")], bridge.character_tokenizer("ab"))


@pytest.mark.parametrize("pair", [([1], [257]), ([257], [1]), ([-1], [1])])
def test_ids_outside_the_vocabulary_are_refused(pair: Any) -> None:
    with pytest.raises(IndexError, match="the vocabulary is 0 to 256"):
        loglikelihood(Listed(), [pair])


def test_scores_that_are_not_finite_are_refused() -> None:
    class Broken(Listed):
        def score_labels(self, ids: np.ndarray, labels: np.ndarray) -> LabelScores:
            return LabelScores(np.full(ids.shape, np.nan), np.ones(ids.shape, int))

    with pytest.raises(BridgeError, match=r"pair 0.*not finite"):
        loglikelihood(Broken(), [([1], [2])])


def test_a_batch_has_at_least_one_pair() -> None:
    with pytest.raises(BridgeError, match="batch_size=0"):
        loglikelihood(Listed(), [([1], [2])], batch_size=0)

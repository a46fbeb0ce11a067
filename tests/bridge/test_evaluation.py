"""Sliding windows: every token is predicted once, from the context that transformers' recipe gives it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.models import TINY

import bridge
from bridge.evaluation import (
    IGNORE_INDEX,
    DocumentScore,
    Evaluation,
    LabelScores,
    SlidingWindows,
    TokenizedText,
    TokenScores,
    document_scores,
)

CONFIG = replace(TINY, vocab_size=1000)

SHAPES = [(n, c, s) for n in (2, 7, 8, 9, 31) for c, s in ((8, 1), (8, 3), (8, 7), (8, 8), (2, 1), (40, 20))]


def windows_over(n: int, context: int, stride: int, batch_size: int = 3) -> SlidingWindows:
    """Make windows over a text in which token i is 100 + i."""
    return SlidingWindows.of(CONFIG, np.arange(100, 100 + n, dtype=np.uint16), context, stride, batch_size)


def predictions(windows: SlidingWindows) -> list[tuple[int, int]]:
    """Return (position, number of visible tokens before it) for every label."""
    found = []
    for input_ids, labels in windows.batches():
        for row_ids, row_labels in zip(input_ids, labels, strict=True):
            for t in np.flatnonzero(row_labels != IGNORE_INDEX):
                np.testing.assert_array_equal(row_ids[: t + 1], row_labels[t] - t - 1 + np.arange(t + 1))
                found.append((int(row_labels[t]) - 100, int(t) + 1))
    return found


@pytest.mark.parametrize(("n", "context", "stride"), SHAPES)
def test_the_tokens_and_contexts_of_all_windows(n: int, context: int, stride: int) -> None:
    expected, reached = [], 0
    for begin in range(0, n, stride):
        end = min(begin + context, n)
        expected += [(p, p - begin) for p in range(max(reached, begin + 1), end)]
        reached = end
        if end == n:
            break
    found = predictions(windows_over(n, context, stride))
    assert found == expected
    positions = [p for p, _ in found]
    if stride < context:
        assert positions == list(range(1, n))
        assert all(seen >= min(p, context - stride) for p, seen in found)
    else:
        assert positions == [p for p in range(n) if p % stride]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_all_batches_have_one_shape(batch_size: int) -> None:
    windows = windows_over(31, 8, 3, batch_size)
    shapes = {(ids.shape, labels.shape, ids.dtype, labels.dtype) for ids, labels in windows.batches()}
    rows = min(batch_size, len(windows))
    assert shapes == {((rows, 8), (rows, 8), np.dtype(np.int32), np.dtype(np.int32))}
    assert predictions(windows) == predictions(windows_over(31, 8, 3, 2))


def test_a_text_shorter_than_the_context_is_one_window_of_its_own_length() -> None:
    [(input_ids, labels)] = windows_over(5, 40, 20).batches()
    assert input_ids.tolist() == [[100, 101, 102, 103, 104]]
    assert labels.tolist() == [[101, 102, 103, 104, IGNORE_INDEX]]


def test_context_stride_and_batch_follow_from_the_model() -> None:
    windows = SlidingWindows.of(CONFIG, np.arange(100))
    assert (windows.context, windows.stride, windows.batch_size) == (40, 20, 4096 // 40)
    assert SlidingWindows.of(CONFIG, np.arange(100), context=7).stride == 3


def test_a_memory_mapped_file_is_read_batch_by_batch(tmp_path: Path) -> None:
    np.arange(100, 131, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    ids = np.memmap(tmp_path / "tokens.bin", np.uint16, "r")
    windows = SlidingWindows.of(CONFIG, ids, 8, 3)
    assert isinstance(windows.text.ids, np.memmap)
    assert predictions(windows) == predictions(windows_over(31, 8, 3))


REFUSED = {
    "empty": ({"ids": []}, "no token.*at least two are needed"),
    "one token": ({"ids": [5]}, "one token.*at least two are needed"),
    "two rows": ({"ids": [[1, 2], [3, 4]]}, r"one-dimensional array.*\(2, 2\)"),
    "not integers": ({"ids": [0.5, 1.5]}, "integers.*float64"),
    "foreign ids": ({"ids": [3, 1000]}, "3 to 1000.*0 to 999"),
    "negative ids": ({"ids": [-1, 7]}, "-1 to 7"),
    "context too long": ({"context": 41}, "context=41.*n_positions=40"),
    "context too short": ({"context": 1}, "context=1: must be from 2"),
    "stride beyond the context": ({"context": 8, "stride": 9}, "stride=9.*context=8.*skipped"),
    "no stride": ({"stride": 0}, "stride=0"),
    "no batch": ({"batch_size": 0}, "batch_size=0"),
    "counts of another length": ({"ids": TokenizedText(np.arange(4), np.ones(3, bool))}, r"counts.*\(4,\).*\(3,\)"),
    "counts that are numbers": ({"ids": TokenizedText(np.arange(4), np.ones(4))}, "counts must be booleans.*float64"),
    "documents that end early": ({"ids": TokenizedText(np.arange(4), None, np.array([2, 3]))}, "last of which is 4"),
    "documents that overlap": ({"ids": TokenizedText(np.arange(4), None, np.array([3, 2, 4]))}, "ascending"),
    "nothing counts": ({"ids": TokenizedText(np.arange(4), np.zeros(4, bool))}, "nothing to predict"),
    "only a first token counts": ({"ids": TokenizedText(np.arange(4), np.arange(4) == 0)}, "nothing to predict"),
    "documents of one token": ({"ids": TokenizedText(np.arange(3), None, np.array([1, 2, 3]))}, "nothing to predict"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_arguments_are_refused(arguments: dict, message: str) -> None:
    ids = arguments.get("ids", [1, 2, 3])
    ids = ids if isinstance(ids, TokenizedText) else np.array(ids)
    with pytest.raises(bridge.BridgeError, match=message):
        SlidingWindows.of(CONFIG, ids, **{k: v for k, v in arguments.items() if k != "ids"})


def test_all_invalid_arguments_are_named_in_one_error() -> None:
    with pytest.raises(bridge.BridgeError, match=r"no token.*context=99.*batch_size=-1"):
        SlidingWindows.of(CONFIG, np.array([]), context=99, batch_size=-1)


@pytest.mark.parametrize(("context", "stride"), [(8, 3), (8, 8), (2, 1), (40, 20)])
def test_the_windows_of_separate_documents_are_those_of_each(context: int, stride: int) -> None:
    ends = np.array([3, 3, 4, 15, 31])  # one of them is empty, one has a single token
    text = TokenizedText(np.arange(100, 131), None, ends)
    expected = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        if end - start > 1:
            alone = SlidingWindows.of(CONFIG, np.arange(100 + start, 100 + end), context, stride, 3)
            expected += [(position, seen) for position, seen in predictions(alone)]
    assert predictions(SlidingWindows.of(CONFIG, text, context, stride, 3)) == expected


def test_only_tokens_that_count_are_predicted() -> None:
    counts = np.arange(31) % 4 == 1
    windows = SlidingWindows.of(CONFIG, TokenizedText(np.arange(100, 131), counts), 8, 3, 3)
    found = predictions(windows)
    assert found == [(p, seen) for p, seen in predictions(windows_over(31, 8, 3)) if counts[p]]
    ones = (LabelScores((labels != IGNORE_INDEX).astype(float)) for _, labels in windows.batches())
    evaluation = windows.evaluation(ones)
    assert (evaluation.nats, evaluation.predicted_tokens, evaluation.loss) == (8.0, 8, 1.0)
    assert evaluation.transformers_loss is None


def test_token_scores_are_at_the_positions_of_the_tokens() -> None:
    windows = windows_over(31, 8, 8, batch_size=3)  # without overlap, so the first token of a window is not predicted

    def scores(labels: np.ndarray) -> LabelScores:
        is_label = labels != IGNORE_INDEX
        return LabelScores(np.where(is_label, labels / 4, 0), np.where(is_label, labels, 0))

    found = windows.evaluation(scores(labels) for _, labels in windows.batches()).token_scores
    assert found is not None
    is_predicted = np.arange(31) % 8 > 0
    np.testing.assert_array_equal(found.ranks, np.where(is_predicted, np.arange(100, 131), 0))
    np.testing.assert_array_equal(found.nats, np.where(is_predicted, np.arange(100, 131) / 4, np.nan))


def test_the_scores_of_documents_add_up_to_the_whole() -> None:
    ranks = np.array([0, 1, 2, 0, 3, 1])
    nats = np.array([np.nan, 1.0, 2.0, np.nan, 4.0, 8.0])
    found = document_scores(TokenScores(nats, ranks), np.array([3, 3, 4, 6]))
    assert found == [
        DocumentScore(3, 2, 3.0),
        DocumentScore(0, 0, 0.0),
        DocumentScore(1, 0, 0.0),
        DocumentScore(2, 2, 12.0),
    ]
    assert (found[0].loss, found[0].perplexity) == (1.5, pytest.approx(math.exp(1.5)))
    assert (found[2].loss, found[2].perplexity) == (None, None)


def test_losses_are_summed_in_float64() -> None:
    """float32 would round the eighths away."""
    windows = windows_over(31, 8, 3, batch_size=2)

    losses = [np.where(labels == IGNORE_INDEX, 0, 2**20 + 0.125).astype(np.float32) for _, labels in windows.batches()]
    assert windows.evaluation(map(LabelScores, losses)).nats == 30 * (2**20 + 0.125)


def test_all_figures_are_computed_from_the_sum() -> None:
    found = Evaluation(60.0, 24, tokens=25, windows=3, context=12, stride=6, transformers_loss=2.4)
    assert found.loss == 2.5
    assert found.perplexity == pytest.approx(math.exp(2.5))
    assert found.word_perplexity(12) == pytest.approx(math.exp(5.0))
    assert found.bits_per_byte(40) == pytest.approx(1.5 / math.log(2))
    assert replace(found, nats=1e9).word_perplexity(1) == math.inf


def test_progress_counts_windows() -> None:
    windows = windows_over(31, 8, 3, batch_size=4)
    calls: list[tuple[int, int]] = []
    windows.evaluation(
        (LabelScores(np.zeros(ids.shape)) for ids, _ in windows.batches()), lambda *call: calls.append(call)
    )
    assert calls == [(4, 9), (8, 9), (9, 9)]

"""Sliding windows: every token is predicted once, from the context that transformers' recipe gives it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.models import TINY

import bridge
from bridge.evaluation import IGNORE_INDEX, Evaluation, SlidingWindows

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
    assert isinstance(windows.ids, np.memmap)
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
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_arguments_are_refused(arguments: dict, message: str) -> None:
    ids = np.array(arguments.get("ids", [1, 2, 3]))
    with pytest.raises(bridge.BridgeError, match=message):
        SlidingWindows.of(CONFIG, ids, **{k: v for k, v in arguments.items() if k != "ids"})


def test_all_invalid_arguments_are_named_in_one_error() -> None:
    with pytest.raises(bridge.BridgeError, match=r"no token.*context=99.*batch_size=-1"):
        SlidingWindows.of(CONFIG, np.array([]), context=99, batch_size=-1)


def test_losses_are_summed_in_float64() -> None:
    """float32 would round the eighths away."""
    windows = windows_over(31, 8, 3, batch_size=2)

    def losses() -> list[np.ndarray]:
        return [
            np.where(labels == IGNORE_INDEX, 0, 2**20 + 0.125).astype(np.float32) for _, labels in windows.batches()
        ]

    assert windows.evaluation(losses()).nats == 30 * (2**20 + 0.125)


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
    windows.evaluation((np.zeros(ids.shape) for ids, _ in windows.batches()), lambda *call: calls.append(call))
    assert calls == [(4, 9), (8, 9), (9, 9)]

"""Packed rows: every token once, documents that are never mixed, best-fit decreasing, and labels within segments."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge import IGNORE_INDEX
from gpt2_jax.data import Batch, DataError, TokenStream, evaluation_batches, training_batches
from gpt2_jax.data import packing as packing_module
from gpt2_jax.data.packing import Packing, best_fit_decreasing, packing
from gpt2_jax.data.tokens.stream import open_tokens
from tests.data.token_files import nanogpt

LENGTH = 10
BATCH = 4


def random_lengths(seed: int, number: int = 60, largest: int = 25) -> list[int]:
    """Return the lengths of documents: many short ones, some longer than a row, and empty ones."""
    return np.random.default_rng(seed).integers(0, largest, number).tolist()


def stream_of(directory: Path, lengths: Sequence[int]) -> TokenStream:
    """Return documents of these lengths. Every token equals its position in the stream."""
    tokens = nanogpt(directory / "tokens.bin", np.arange(sum(lengths)))
    files = open_tokens(tokens)[0].files
    return TokenStream.of(files, document_ends=np.cumsum(lengths))


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    return stream_of(tmp_path, random_lengths(0))


def batches(stream: TokenStream, number: int, **options: Any) -> list[Batch]:
    options = {"batch_size": BATCH, "seq_len": LENGTH, "seed": 11, "examples": "packed"} | options
    return list(islice(training_batches(stream, **options), number))


def in_order(stream: TokenStream, **options: Any) -> list[Batch]:
    options = {"batch_size": BATCH, "seq_len": LENGTH, "examples": "packed"} | options
    return list(evaluation_batches(stream, **options))


def assert_equal(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def segments_of(batch: Batch, row: int) -> list[list[int]]:
    """Return the tokens of each segment of a row. Checks that they are numbered 1, 2, ... and followed by padding."""
    ids, numbers = batch["input_ids"][row], batch["segment_ids"][row]
    used = numbers[numbers > 0]
    np.testing.assert_array_equal(numbers[: len(used)], np.sort(used))
    assert set(used.tolist()) == set(range(1, max(used, default=0) + 1))
    assert not ids[len(used) :].any() and not numbers[len(used) :].any()
    return [ids[numbers == n].tolist() for n in range(1, max(used, default=0) + 1)]


def pieces(lengths: Sequence[int]) -> list[list[int]]:
    """Return the tokens of each piece of the documents: at most `LENGTH` tokens from a document's start."""
    ends = np.cumsum(lengths)
    documents = [list(range(end - n, end)) for end, n in zip(ends.tolist(), lengths, strict=True)]
    return [document[i : i + LENGTH] for document in documents for i in range(0, len(document), LENGTH)]


@pytest.mark.parametrize("seed", range(5))
def test_an_epoch_has_every_piece_once(tmp_path: Path, seed: int) -> None:
    lengths = random_lengths(seed)
    stream = stream_of(tmp_path, lengths)
    rows = len(packing(np.cumsum(lengths), LENGTH))
    for first in (0, 1):
        read = batches(stream, rows, batch_size=1, start_step=first * rows)
        found = [segment for batch in read for segment in segments_of(batch, 0)]
        assert sorted(found) == sorted(pieces(lengths))


def test_labels_are_the_next_tokens_within_the_segment(stream: TokenStream) -> None:
    for batch in batches(stream, 30) + in_order(stream)[:-1]:
        assert list(batch) == ["input_ids", "labels", "segment_ids"]
        assert all(array.shape == (BATCH, LENGTH) and array.dtype == np.int32 for array in batch.values())
        ids, segments = (np.pad(batch[name], [(0, 0), (0, 1)]) for name in ("input_ids", "segment_ids"))
        continues = (segments[:, 1:] == segments[:, :-1]) & (segments[:, :-1] > 0)
        np.testing.assert_array_equal(batch["labels"], np.where(continues, ids[:, 1:], IGNORE_INDEX))


def by_definition(lengths: Sequence[int], capacity: int) -> list[int]:
    """Best-fit decreasing without the table of free rows. Ties go to the row that was changed last."""
    free: list[int] = []
    changed: list[int] = []
    row_of_piece = [0] * len(lengths)
    for time, piece in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fitting = [row for row, room in enumerate(free) if room >= lengths[piece]]
        if not fitting:
            fitting, free, changed = [len(free)], [*free, capacity], [*changed, time]
        row = min(fitting, key=lambda row: (free[row], -changed[row]))
        free[row] -= lengths[piece]
        changed[row], row_of_piece[piece] = time, row
    return row_of_piece


@pytest.mark.parametrize("capacity", [1, 2, 10, 64, 200])
@pytest.mark.parametrize("seed", range(5))
def test_rows_are_those_of_best_fit_decreasing(seed: int, capacity: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, capacity + 1, 150)
    assert best_fit_decreasing(lengths, capacity).tolist() == by_definition(lengths.tolist(), capacity)


def test_a_packing_of_known_size() -> None:
    """Ten halves, and pairs of 7 and 3, fill their rows."""
    lengths = [5] * 10 + [7, 3] * 4
    packed = packing(np.cumsum(lengths), LENGTH)
    assert len(packed) == 9
    assert all(sum(stop - start for start, stop in packed.spans(row)) == LENGTH for row in range(9))


@pytest.mark.parametrize("window", [1, 7, 2**16])
def test_pieces_of_different_windows_are_not_packed_together(
    window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing_module, "WINDOW", window)
    packing_module._packing.cache_clear()
    lengths = random_lengths(3)
    number = {piece[0]: i for i, piece in enumerate(pieces(lengths))}
    read = in_order(stream_of(tmp_path, lengths), batch_size=1)
    packing_module._packing.cache_clear()
    rows = [[number[segment[0]] // window for segment in segments_of(batch, 0)] for batch in read]
    assert all(len(set(row)) == 1 for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert sum(map(len, rows)) == len(number)


@pytest.mark.parametrize("step", [0, 1, 17, 40])
def test_any_step_can_be_the_first(stream: TokenStream, step: int) -> None:
    assert_equal(batches(stream, 4, start_step=step), batches(stream, step + 4)[step:])


def test_a_late_step_costs_no_more_than_an_early_one(stream: TokenStream) -> None:
    assert_equal(batches(stream, 1, start_step=10**9), batches(stream, 2, start_step=10**9 - 1)[1:])


def test_the_order_depends_on_the_epoch_and_the_seed(stream: TokenStream) -> None:
    assert stream.document_ends is not None
    rows = len(packing(stream.document_ends, LENGTH))
    read = [batches(stream, rows, batch_size=1, **more) for more in ({}, {"start_step": rows}, {"seed": 12})]
    orders = [[tuple(batch["input_ids"][0]) for batch in epoch] for epoch in read]
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])


def test_the_order_does_not_change_between_versions(tmp_path: Path) -> None:
    """Runs of an older version can be resumed only if this does not change."""
    lengths = [3, 14, 6, 2, 7, 4, 9, 1, 5, 8]
    packed = packing(np.cumsum(lengths), LENGTH)
    assert [packed.spans(row) for row in range(len(packed))] == [
        [(3, 13)],
        [(36, 45)],
        [(23, 25), (51, 59)],
        [(0, 3), (25, 32)],
        [(13, 17), (17, 23)],
        [(32, 36), (45, 46), (46, 51)],
    ]
    read = batches(stream_of(tmp_path, lengths), 4, batch_size=3)
    assert [batch["input_ids"][:, 0].tolist() for batch in read] == [[0, 32, 3], [23, 36, 13], [0, 3, 32], [23, 36, 13]]


@pytest.mark.parametrize("processes", [2, 4])
def test_rows_of_a_batch_can_be_read_separately(stream: TokenStream, processes: int) -> None:
    size = 8 // processes
    rows = [slice(p * size, (p + 1) * size) for p in range(processes)]
    for read in (partial(batches, stream, 20, batch_size=8), partial(in_order, stream, batch_size=8)):
        parts = zip(*(read(rows=part) for part in rows), strict=True)
        assert_equal(
            read(), [{name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in parts]
        )


def test_evaluation_reads_every_row_once_and_ignores_the_rest_of_the_last_batch(tmp_path: Path) -> None:
    lengths = [10] * 5 + [4, 4]
    read = in_order(stream_of(tmp_path, lengths), batch_size=4)
    assert len(read) == 2
    rows = [segments_of(batch, row) for batch in read for row in range(4)]
    assert rows[:6] == [[list(range(i, i + 10))] for i in range(0, 50, 10)] + [[[50, 51, 52, 53], [54, 55, 56, 57]]]
    counted = np.concatenate([(batch["labels"] != IGNORE_INDEX).sum(1) for batch in read])
    assert counted.tolist() == [9] * 5 + [6, 0, 0]
    assert all((batch["segment_ids"] > 0).any(1).all() for batch in read)


def test_a_part_of_a_stream_has_the_pieces_of_its_documents(tmp_path: Path) -> None:
    lengths = [8, 9, 12, 7]
    part = stream_of(tmp_path, lengths).part(5, 31)  # cuts the first and the last document
    found = sorted(segment for batch in in_order(part, batch_size=1) for segment in segments_of(batch, 0))
    assert found == [[*range(5, 8)], [*range(8, 17)], [*range(17, 27)], [27, 28], [29, 30]]


def test_the_same_files_with_other_documents_have_another_packing(tmp_path: Path) -> None:
    files = stream_of(tmp_path, [10, 20]).files
    for lengths in ([10, 20], [7, 23], [30]):
        found = in_order(TokenStream.of(files, document_ends=np.cumsum(lengths)), batch_size=1)
        assert sorted(s for batch in found for s in segments_of(batch, 0)) == sorted(pieces(lengths))


def test_streams_without_documents_or_tokens_are_refused(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, [10, 20])
    bare, empty = (
        TokenStream.of(stream.files),
        TokenStream.of(stream.files, document_ends=np.array([10, 30])).part(3, 3),
    )
    for read in (batches, in_order):
        with pytest.raises(DataError, match=r"do not store where documents end.*--examples stream"):
            read(bare, *([1] if read is batches else []))  # type: ignore[operator]
        with pytest.raises(DataError, match="has no tokens"):
            read(empty, *([1] if read is batches else []))  # type: ignore[operator]


def test_the_memory_of_a_packing_is_that_of_its_docstring() -> None:
    ends = np.cumsum(np.random.default_rng(0).integers(1, 2048, 10**5))
    packed = packing(ends, 1024)
    pieces, rows = len(packed.starts), len(packed)
    assert sum(getattr(packed, name).nbytes for name in ("starts", "lengths", "ends")) == 12 * pieces + 8 * rows
    packing_module._packing.cache_clear()
    tracemalloc.start()
    packing(ends, 1024)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept <= 12 * pieces + 8 * rows + 8 * len(ends) + 2**16
    assert peak <= 100 * pieces + 2**23


def test_a_second_evaluation_uses_the_first_packing(stream: TokenStream) -> None:
    packing_module._packing.cache_clear()
    in_order(stream), batches(stream, 3), in_order(stream)
    assert packing_module._packing.cache_info().misses == 1


def test_padding_of_packed_documents_is_a_small_part() -> None:
    """The example of the documentation: lengths of documents are log-normal."""
    lengths = np.random.default_rng(0).lognormal(5.5, 1.0, 20_000).astype(int) + 1
    packed: Packing = packing(np.cumsum(lengths), 1024)
    assert 1 - lengths.sum() / (1024 * len(packed)) < 0.001
    assert 1 - np.minimum(lengths, 1024).sum() / (1024 * len(lengths)) > 0.6


def masked(plain: TokenStream, directory: Path, counts: np.ndarray) -> TokenStream:
    """Return the stream with these tokens' counts in the loss, 0 or 1."""
    directory.mkdir()
    files = open_tokens(nanogpt(directory / "tokens.bin", counts))[0].files
    return replace(plain, counts=TokenStream.of(files))


def test_tokens_that_do_not_count_are_no_labels(tmp_path: Path) -> None:
    lengths = random_lengths(5, largest=LENGTH + 1)
    counts = np.random.default_rng(6).integers(0, 2, sum(lengths))
    plain = stream_of(tmp_path, lengths)
    some = masked(plain, tmp_path / "counts", counts)
    for all_count, some_count in zip(batches(plain, 20), batches(some, 20), strict=True):
        labels = all_count["labels"]
        expected = np.where((labels != IGNORE_INDEX) & (counts[labels] == 1), labels, IGNORE_INDEX)
        np.testing.assert_array_equal(some_count["labels"], expected)
        np.testing.assert_array_equal(some_count["input_ids"], all_count["input_ids"])


@pytest.mark.parametrize(("examples", "room"), [("packed", LENGTH), ("documents", LENGTH + 1)])
def test_a_record_with_a_completion_is_never_cut(tmp_path: Path, examples: str, room: int) -> None:
    for length, is_refused in ((room, False), (room + 1, True)):
        lengths = [3, length, 2]
        (directory := tmp_path / str(length)).mkdir()
        stream = masked(stream_of(directory, lengths), directory / "counts", np.ones(sum(lengths), int))
        if is_refused:
            with pytest.raises(DataError, match=rf"a record has {length} tokens, and a row has room for {room};"):
                batches(stream, 1, examples=examples)
        else:
            assert len(batches(stream, 1, examples=examples)) == 1

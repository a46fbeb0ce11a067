"""Batches: a function of the seed and the step, a permutation in each epoch, and fixed for evaluation."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge import IGNORE_INDEX, byte_tokenizer
from gpt2_jax.data import Batch, DataError, TokenStream, evaluation_batches, training_batches
from gpt2_jax.data.batches import _shuffled, _Windows
from gpt2_jax.data.text.documents import find_documents
from gpt2_jax.data.tokens.cache import cached_text
from gpt2_jax.data.tokens.stream import open_tokens
from tests.data.token_files import llmc, nanogpt

LENGTH = 7
BATCH = 5
COUNT = 1003
WINDOWS = (COUNT - LENGTH) // LENGTH  # of one epoch


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    """A stream in which every token equals its position."""
    return open_tokens(nanogpt(tmp_path / "tokens.bin", np.arange(COUNT)))[0]


@pytest.fixture
def documents(tmp_path: Path) -> TokenStream:
    """Documents of 1 to 20 bytes, each followed by an end-of-text token."""
    (tmp_path / "texts").mkdir()
    for n in range(1, 21):
        (tmp_path / "texts" / str(n)).write_text(chr(96 + n) * n)
    return cached_text(find_documents(tmp_path / "texts"), byte_tokenizer(), cache=tmp_path / "cache").tokens


def batches(stream: TokenStream, number: int, **options: Any) -> list[Batch]:
    options = {"batch_size": BATCH, "seq_len": LENGTH, "seed": 11} | options
    return list(islice(training_batches(stream, **options), number))


def assert_equal(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_a_batch_has_the_promised_shapes_and_labels_follow(stream: TokenStream) -> None:
    for batch in batches(stream, 3):
        assert batch.keys() == {"input_ids", "labels"}
        for array in batch.values():
            assert array.shape == (BATCH, LENGTH) and array.dtype == np.int32 and array.flags.c_contiguous
        np.testing.assert_array_equal(batch["labels"], batch["input_ids"] + 1)
        np.testing.assert_array_equal(np.diff(batch["input_ids"]), 1)


@pytest.mark.parametrize("step", [0, 1, 17, 28, 29, 100])
def test_any_step_can_be_the_first(stream: TokenStream, step: int) -> None:
    assert_equal(batches(stream, 4, start_step=step), batches(stream, step + 4)[step:])


def test_a_late_step_costs_no_more_than_an_early_one(stream: TokenStream) -> None:
    assert_equal(batches(stream, 1, start_step=10**9), batches(stream, 2, start_step=10**9 - 1)[1:])


def first_tokens(all_batches: list[Batch]) -> list[int]:
    return [row for batch in all_batches for row in batch["input_ids"][:, 0].tolist()]


def epochs(stream: TokenStream, number: int, windows: int = WINDOWS, **options: Any) -> list[list[int]]:
    """The first tokens of the windows of each epoch, in reading order."""
    starts = first_tokens(batches(stream, -(-number * windows // BATCH), **options))
    return [starts[e * windows : (e + 1) * windows] for e in range(number)]


def test_an_epoch_reads_every_window_once_without_overlap(stream: TokenStream) -> None:
    for starts in epochs(stream, 3):
        assert len(set(starts)) == WINDOWS
        assert sorted(starts) == list(range(min(starts), min(starts) + WINDOWS * LENGTH, LENGTH))


def test_each_epoch_has_another_order_and_other_window_borders(stream: TokenStream) -> None:
    read = epochs(stream, 40)
    assert all(starts != sorted(starts) for starts in read)
    ranks = {tuple(np.argsort(starts).tolist()) for starts in read}
    assert len(ranks) == 40
    borders = Counter(min(starts) % LENGTH for starts in read)
    assert len(borders) == LENGTH


def test_over_many_epochs_no_token_is_favoured(stream: TokenStream) -> None:
    seen = np.zeros(COUNT)
    windows = _Windows(stream, LENGTH, seed=11)
    for number in range(200 * WINDOWS):
        start, _ = windows.span(number)
        seen[start : start + LENGTH] += 1
    edge = 2 * LENGTH
    assert (seen[edge:-edge] == 200).all()
    assert (seen <= 200).all()


@pytest.mark.parametrize("windows", [1, 2, 3, 100, 2**16, 2**16 + 1, 2**16 + 2, 10**5])
def test_an_order_is_a_random_permutation(windows: int) -> None:
    """Each number occurs once; the mean of the first half equals that of all, within 5 standard errors."""
    order = np.array([_shuffled(k, windows, 11, 3) for k in range(windows)])
    np.testing.assert_array_equal(np.sort(order), np.arange(windows))
    half = order[: -(-windows // 2)]
    assert abs(half.mean() - (windows - 1) / 2) <= 5 * windows / 12**0.5 / len(half) ** 0.5


def test_the_order_depends_on_the_seed_and_the_stream_alone(stream: TokenStream, tmp_path: Path) -> None:
    llmc(tmp_path / "shard_0.bin", np.arange(400))
    llmc(tmp_path / "shard_1.bin", np.arange(400, COUNT))
    shards, _ = open_tokens(tmp_path / "shard_*.bin")
    assert_equal(batches(stream, 40), batches(shards, 40))
    assert first_tokens(batches(stream, 40)) != first_tokens(batches(stream, 40, seed=12))
    # Consecutive seeds must not read the same epochs with a shift.
    assert epochs(stream, 2, seed=12)[0] != epochs(stream, 2)[1]


def test_the_order_does_not_change_between_versions() -> None:
    """Runs of an older version can be resumed only if this does not change."""
    places = (0, 1, 2, WINDOWS, WINDOWS + 1, 10**9)
    spans = [_Windows(TokenStream((), 0, COUNT), LENGTH, seed=11).span(n) for n in places]
    assert [start for start, _ in spans] == [520, 226, 324, 165, 25, 532]
    many = _Windows(TokenStream((), 0, 10**9), LENGTH, seed=11)
    assert [many.span(n)[0] for n in places] == [220339381, 672030285, 364453610, 184094529, 770375021, 478255838]


@pytest.mark.parametrize("processes", [2, 5])
def test_rows_of_a_batch_can_be_read_separately(stream: TokenStream, documents: TokenStream, processes: int) -> None:
    size = 10 // processes
    rows = [slice(p * size, (p + 1) * size) for p in range(processes)]
    joined = ("input_ids", "labels")
    for options in ({"examples": "stream"}, {"examples": "documents"}):
        source = documents if options["examples"] == "documents" else stream
        whole = batches(source, 30, batch_size=10, **options)
        parts = [batches(source, 30, batch_size=10, rows=r, **options) for r in rows]
        for name in joined:
            for step, batch in enumerate(whole):
                np.testing.assert_array_equal(batch[name], np.concatenate([part[step][name] for part in parts]))
    whole = list(evaluation_batches(stream, batch_size=10, seq_len=LENGTH))
    parts = [list(evaluation_batches(stream, batch_size=10, seq_len=LENGTH, rows=r)) for r in rows]
    for name in joined:
        for step, batch in enumerate(whole):
            np.testing.assert_array_equal(batch[name], np.concatenate([part[step][name] for part in parts]))


@pytest.mark.parametrize("extra", range(1, 2 * LENGTH + 2))
def test_short_streams_have_at_least_one_window(tmp_path: Path, extra: int) -> None:
    count = LENGTH + extra
    stream = open_tokens(nanogpt(tmp_path / "tokens.bin", np.arange(count)))[0]
    for batch in batches(stream, 50):
        np.testing.assert_array_equal(batch["labels"], batch["input_ids"] + 1)
        assert batch["labels"].max() < count
    assert sum(1 for _ in evaluation_batches(stream, batch_size=1, seq_len=LENGTH)) == (count - 1) // LENGTH


@pytest.mark.parametrize(("make", "which"), [(training_batches, "data"), (evaluation_batches, "validation data")])
def test_a_stream_shorter_than_a_window_is_an_error(tmp_path: Path, make: Any, which: str) -> None:
    stream = open_tokens(nanogpt(tmp_path / "tokens.bin", np.arange(LENGTH)))[0]
    with pytest.raises(DataError, match=f"the {which} has 7 tokens, and one window of seq_len=7 takes 8"):
        make(stream, batch_size=BATCH, seq_len=LENGTH)


def test_documents_are_padded_masked_and_truncated(documents: TokenStream) -> None:
    length = 9
    seen = []
    for batch in batches(documents, 4, batch_size=5, seq_len=length, examples="documents"):
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            n = int(ids[0]) - 96
            whole = [96 + n] * n + [256]
            real = min(length, n + 1)
            assert ids.tolist() == whole[:length] + [0] * (length - real)
            assert mask.tolist() == [1] * real + [0] * (length - real)
            assert labels.tolist() == whole[1 : length + 1] + [IGNORE_INDEX] * (length - min(length, n))
            seen.append(n)
    assert sorted(seen) == list(range(1, 21))


def test_documents_are_shuffled_anew_in_every_epoch(documents: TokenStream) -> None:
    orders = [
        tuple(
            int(b["input_ids"][0, 0]) for b in batches(documents, 20, batch_size=1, start_step=s, examples="documents")
        )
        for s in (0, 20, 40)
    ]
    assert len(set(orders)) == 3
    assert all(sorted(order) == list(range(97, 117)) for order in orders)


def test_a_part_of_a_stream_has_its_documents(documents: TokenStream) -> None:
    assert documents.document_ends is not None
    ends = documents.document_ends.tolist()
    part = documents.part(ends[4] + 1, ends[11] - 1)  # truncates its first and last document
    assert part.document_ends is not None
    assert part.document_ends.tolist() == [e - ends[4] - 1 for e in ends[5:11]] + [len(part)]
    assert sum(b["attention_mask"].sum() for b in documents_in_order(part, length=40)) == len(part)


def documents_in_order(stream: TokenStream, length: int) -> list[Batch]:
    return list(evaluation_batches(stream, batch_size=1, seq_len=length, examples="documents"))


def test_token_files_without_document_ends_give_no_documents(stream: TokenStream) -> None:
    with pytest.raises(DataError, match="do not store where documents end"):
        training_batches(stream, batch_size=BATCH, seq_len=LENGTH, examples="documents")


def test_evaluation_reads_the_stream_once_in_order(stream: TokenStream) -> None:
    read = list(evaluation_batches(stream, batch_size=BATCH, seq_len=LENGTH))
    assert all(batch["input_ids"].shape == (BATCH, LENGTH) for batch in read)
    labels = np.concatenate([batch["labels"].ravel() for batch in read])
    windows = (COUNT - 1) // LENGTH
    np.testing.assert_array_equal(labels[labels != IGNORE_INDEX], np.arange(1, windows * LENGTH + 1))
    assert (labels == IGNORE_INDEX).sum() == (len(read) * BATCH - windows) * LENGTH > 0
    assert_equal(read, list(evaluation_batches(stream, batch_size=BATCH, seq_len=LENGTH)))


def test_an_evaluation_of_fewer_batches_is_spread_over_the_stream(stream: TokenStream) -> None:
    read = list(evaluation_batches(stream, batch_size=BATCH, seq_len=LENGTH, max_batches=3))
    starts = first_tokens(read)
    assert len(read) == 3 and starts == sorted(starts) and len(set(starts)) == 15
    gaps = np.diff(starts)
    assert max(gaps) - min(gaps) <= LENGTH and starts[0] == 0 and starts[-1] > 0.9 * COUNT
    assert all((batch["labels"] != IGNORE_INDEX).all() for batch in read)
    everything = list(evaluation_batches(stream, batch_size=BATCH, seq_len=LENGTH))
    assert_equal(everything, list(evaluation_batches(stream, batch_size=BATCH, seq_len=LENGTH, max_batches=10**6)))


def test_documents_are_evaluated_in_order_with_every_row_attending_to_something(documents: TokenStream) -> None:
    read = list(evaluation_batches(documents, batch_size=6, seq_len=30, examples="documents"))
    assert len(read) == 4
    assert all((batch["attention_mask"].sum(1) > 0).all() for batch in read)
    assert (read[-1]["labels"][2:] == IGNORE_INDEX).all() and (read[-1]["labels"][:2] != IGNORE_INDEX).any()
    labels = np.concatenate([batch["labels"] for batch in read])
    assert (labels != IGNORE_INDEX).sum() == sum(range(1, 21))  # the length of each document, whose end is a label


def test_a_bad_token_stops_the_iteration_with_its_error(tmp_path: Path) -> None:
    stream, _ = open_tokens(nanogpt(tmp_path / "tokens.bin", [*range(50), 999]), vocab_size=100)
    with pytest.raises(DataError, match="has the id 999 at token 50"):
        batches(stream, 100)

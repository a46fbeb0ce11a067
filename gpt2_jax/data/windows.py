"""Batches from a token stream: any step's batch by its number, read ahead on threads by grain.

A batch is a dictionary of int32 [B, T] arrays: `input_ids`; `labels`, the token that follows each, or
`IGNORE_INDEX`; and for documents `attention_mask`, 1 for tokens and 0 for padding.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import grain
import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int

from bridge import IGNORE_INDEX
from gpt2_jax.data.errors import DataError
from gpt2_jax.data.tokens import TokenStream

Batch = dict[str, Int[np.ndarray, "B T"]]
Examples = Literal["stream", "documents"]

READING = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
"""A batch is a few dozen copies; two threads keep ahead of any step, and eight batches cover a slow disk."""

ALL_ROWS = slice(None)

_SMALL = 2**16
"""Up to so many examples an epoch's order is kept whole. Beyond, grain's index_shuffle needs no memory;
below, it searches among 2**16 numbers for one in range: 10 ms for each of two examples."""


def training_batches(
    stream: TokenStream,
    *,
    batch_size: int,
    seq_len: int,
    seed: int = 0,
    start_step: int = 0,
    examples: Examples = "stream",
    rows: slice = ALL_ROWS,
) -> Iterator[Batch]:
    """The batches of steps start_step, start_step + 1, ... without end.

    Batch number s depends on the stream, `batch_size`, `seq_len`, `seed` and s, and on nothing else.
    An epoch visits every example once, in an order drawn from the seed and the epoch; the batch in
    which one epoch ends goes on with the next.

    Args:
        examples: "stream": windows of length + 1 tokens that follow each other, from a beginning
            that is drawn for each epoch, so that the borders between windows move; what is left at
            the two ends is less than two windows. "documents": each document is an example, cut
            to `seq_len` and padded on the right.
        rows: the rows of each batch that this process reads; the batches are the same for any.

    Raises `DataError` for a stream that is too short, or has no documents where they are asked for.
    """
    chosen = _Documents(stream, seq_len, seed) if examples == "documents" else _Windows(stream, seq_len, seed)
    return iter(grain.MapDataset.source(_Batches(chosen, batch_size, rows))[start_step:].to_iter_dataset(READING))


def evaluation_batches(
    stream: TokenStream,
    *,
    batch_size: int,
    seq_len: int,
    most_batches: int | None = None,
    examples: Examples = "stream",
    rows: slice = ALL_ROWS,
) -> Iterator[Batch]:
    """The stream's examples once, in order; with `most_batches`, so many batches evenly spaced over it.

    Windows do not overlap and begin at the stream's first token; what is left after the last is not
    used. The last batch is filled up with rows whose labels are all `IGNORE_INDEX`: one shape for all.
    """
    chosen = _Documents(stream, seq_len) if examples == "documents" else _Windows(stream, seq_len)
    number = min(-(-chosen.count // batch_size), most_batches or sys.maxsize)
    wanted = min(number * batch_size, chosen.count)
    indices = np.arange(wanted) * chosen.count // wanted
    source = _EvaluationBatches(chosen, indices, batch_size, rows)
    return iter(grain.MapDataset.source(source).to_iter_dataset(READING))


@dataclass(frozen=True)
class _Windows:
    """Windows of one epoch after another; without a seed, those of the stream in order."""

    stream: TokenStream
    seq_len: int
    seed: int | None = None
    masked = False

    def __post_init__(self) -> None:
        if len(self.stream) <= self.seq_len:
            which = "validation data" if self.seed is None else "data"
            raise DataError(
                f"the {which} has {len(self.stream)} tokens, and one window of seq_len={self.seq_len} takes "
                f"{self.seq_len + 1}; choose a smaller seq_len, or more data"
            )
        if self.count > 2**32:
            raise DataError(f"the data has {self.count} windows, and 2**32 can be shuffled; choose a larger seq_len")

    @cached_property
    def count(self) -> int:
        whole = (len(self.stream) - 1) // self.seq_len
        # One fewer leaves room for the beginning to move by any number below `seq_len`.
        return whole if self.seed is None else max(1, (len(self.stream) - self.seq_len) // self.seq_len)

    def span(self, number: int) -> tuple[int, int]:
        """Where in the stream example `number` stands."""
        start = number * self.seq_len
        if self.seed is not None:
            epoch, k = divmod(number, self.count)
            room = len(self.stream) - self.count * self.seq_len
            start = _shuffled(k, self.count, self.seed, epoch) * self.seq_len + _drawn(self.seed, epoch)[1] % room
        return start, start + self.seq_len + 1


@dataclass(frozen=True)
class _Documents:
    """Documents of one epoch after another; without a seed, in the order of the stream."""

    stream: TokenStream
    seq_len: int
    seed: int | None = None
    masked = True

    def __post_init__(self) -> None:
        if self.stream.document_ends is None:
            raise DataError(
                "these token files do not say where a document ends, so documents cannot be examples; "
                "train on the stream, or give the text"
            )

    @cached_property
    def count(self) -> int:
        assert self.stream.document_ends is not None
        return len(self.stream.document_ends)

    def span(self, number: int) -> tuple[int, int]:
        ends = self.stream.document_ends
        assert ends is not None
        k = number
        if self.seed is not None:
            epoch, k = divmod(number, self.count)
            k = _shuffled(k, self.count, self.seed, epoch)
        start = int(ends[k - 1]) if k else 0
        return start, min(int(ends[k]), start + self.seq_len + 1)


@dataclass(frozen=True)
class _Batches:
    """What grain reads: batch number s, as a random-access source."""

    examples: _Windows | _Documents
    batch_size: int
    rows: slice

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size

    def __getitem__(self, step: int) -> Batch:
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)[self.rows]
        return _batch(self.examples, numbers)


@dataclass(frozen=True)
class _EvaluationBatches:
    examples: _Windows | _Documents
    indices: np.ndarray
    batch_size: int
    rows: slice

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        of_batch = self.indices[number * self.batch_size : (number + 1) * self.batch_size]
        # An example again, and not zeros: a row without one token would have nothing to attend to.
        full = np.concatenate([of_batch, np.repeat(of_batch[:1], self.batch_size - len(of_batch))])
        real = np.arange(self.batch_size) < len(of_batch)
        batch = _batch(self.examples, full[self.rows].tolist())
        batch["labels"][~real[self.rows]] = IGNORE_INDEX
        return batch


def _batch(examples: _Windows | _Documents, numbers: Sequence[int]) -> Batch:
    """The examples of these numbers as rows, each of 1 to seq_len + 1 tokens."""
    tokens = examples.stream.read_spans(map(examples.span, numbers))
    if not examples.masked:
        rows = np.stack(tokens)
        return {"input_ids": rows[:, :-1].copy(), "labels": rows[:, 1:].copy()}
    ids = np.zeros((len(tokens), examples.seq_len), np.int32)
    labels, mask = np.full_like(ids, IGNORE_INDEX), np.zeros_like(ids)
    for row, document in enumerate(tokens):
        ids[row, : len(document)] = document[: examples.seq_len]
        labels[row, : len(document) - 1] = document[1:]
        mask[row, : len(document)] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def _shuffled(k: int, count: int, seed: int, epoch: int) -> int:
    """The example in place k of an epoch."""
    if count <= _SMALL:
        return int(_order(count, seed, epoch)[k])
    # Where the largest index is a power of four, grain 0.2.18 gives one twice and that one never. Shuffling one
    # more, and what falls on it again, is a permutation of the rest.
    largest = count - 1 if (count - 1) & (count - 2) else count
    while (k := index_shuffle(k, max_index=largest, seed=_drawn(seed, epoch)[0], rounds=4)) >= count:
        pass
    return k


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    # numpy promises that the raw numbers of a bit generator never change; of shuffles it does not.
    return np.argsort(np.random.PCG64(_drawn(seed, epoch)[0]).random_raw(count), kind="stable")


@lru_cache(maxsize=16)
def _drawn(seed: int, epoch: int) -> tuple[int, int]:
    """Two numbers below 2**32 for an epoch: the seed of its order, and where its windows begin."""
    order, beginning = np.random.SeedSequence([seed, epoch]).generate_state(2).tolist()
    return order, beginning

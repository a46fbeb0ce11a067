"""Batches from a token stream. Each batch is computed from the number of its step; grain reads ahead on threads.

A batch is a dictionary of int32 [B, T] arrays: `input_ids`; `labels`, the next tokens, or `IGNORE_INDEX` for positions
that do not count; for documents `attention_mask`, 1 for tokens and 0 for padding; and for packed documents
`segment_ids`, the number of the document in its row, or 0 for padding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import grain
import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int

from bridge import IGNORE_INDEX
from gpt2_jax.data.errors import DataError
from gpt2_jax.data.mixture import Mixture, places
from gpt2_jax.data.packing import Packing, packed_batch, packing
from gpt2_jax.data.tokens.stream import TokenStream

Batch = dict[str, Int[np.ndarray, "B T"]]
Examples = Literal["stream", "documents", "packed"]

READING = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
"""A batch is a few dozen reads, so two threads are faster than any training step. Eight batches hide a slow disk."""

ALL_ROWS = slice(None)

_MAX_STORED_ORDER = 2**16
"""For epochs with more examples than this, the order is not stored but computed by grain's index_shuffle. With fewer
examples, index_shuffle is slow, because it draws from 2**16 numbers until one is in range: 10 ms per example for two
examples."""


def training_batches(
    stream: TokenStream | Mixture,
    *,
    batch_size: int,
    seq_len: int,
    seed: int = 0,
    start_step: int = 0,
    examples: Examples = "stream",
    rows: slice = ALL_ROWS,
) -> Iterator[Batch]:
    """Yield the batches of steps start_step, start_step + 1, ... without end.

    Batch s depends only on the stream, `batch_size`, `seq_len`, `seed`, `examples` and s. An epoch visits every example
    once, in an order drawn from the seed and the epoch. A batch may contain the end of one epoch and the start of the
    next.

    Args:
        stream: one stream, or a mixture. The epochs of a mixture's streams are independent: each stream begins its
            next epoch when all of its own examples have been used.
        examples: "stream": consecutive windows of seq_len + 1 tokens. Each epoch starts at another random offset, so
            that the borders between windows move; fewer than two windows of tokens are left out at the ends.
            "documents": each document is one example, truncated to `seq_len` and padded on the right.
            "packed": several documents fill one row (`gpt2_jax.data.packing`). The same documents share a row in every
            epoch, and each epoch has a different order of rows.
        rows: the rows of each batch that this process reads.

    Raises:
        DataError: the stream is too short, or `examples` is not "stream" and the document ends are unknown.
    """
    source = _training_source(stream, examples, seq_len, seed)
    return iter(grain.MapDataset.source(_Batches(source, batch_size, rows))[start_step:].to_iter_dataset(READING))


def evaluation_batches(
    stream: TokenStream,
    *,
    batch_size: int,
    seq_len: int,
    max_batches: int | None = None,
    examples: Examples = "stream",
    rows: slice = ALL_ROWS,
) -> Iterator[Batch]:
    """Yield the examples of the stream once, in order. Packed rows are in the order of the packing.

    Windows do not overlap and start at the first token; tokens after the last whole window are not used. The last batch
    is filled with rows whose labels are all `IGNORE_INDEX`, so that all batches have the same shape.

    Args:
        max_batches: yield at most this many batches, with examples evenly spaced over the stream.
        examples, rows: as for `training_batches`.
    """
    source = _SOURCES[examples](stream, seq_len)
    num_batches = min(-(-source.count // batch_size), max_batches or sys.maxsize)
    wanted = min(num_batches * batch_size, source.count)
    indices = np.arange(wanted) * source.count // wanted
    batches = _EvaluationBatches(source, indices, batch_size, rows)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(READING))


@dataclass(frozen=True)
class _Windows:
    """The windows of the stream as numbered examples: in order, or with a seed, shuffled within each epoch."""

    stream: TokenStream
    seq_len: int
    seed: int | None = None
    masked = False

    def __post_init__(self) -> None:
        if len(self.stream) <= self.seq_len:
            which = "validation data" if self.seed is None else "data"
            raise DataError(
                f"the {which} has {len(self.stream)} tokens, and one window of seq_len={self.seq_len} takes "
                f"{self.seq_len + 1}; choose a smaller seq_len, or give more data"
            )
        if self.count > 2**32:
            raise DataError(
                f"the data has {self.count} windows, but at most 2**32 can be shuffled; choose a larger seq_len"
            )

    @cached_property
    def count(self) -> int:
        whole = (len(self.stream) - 1) // self.seq_len
        # One window fewer leaves room for any offset below `seq_len`.
        return whole if self.seed is None else max(1, (len(self.stream) - self.seq_len) // self.seq_len)

    def span(self, number: int) -> tuple[int, int]:
        """Return start and stop of example `number` in the stream."""
        start = number * self.seq_len
        if self.seed is not None:
            epoch, k = divmod(number, self.count)
            room = len(self.stream) - self.count * self.seq_len
            start = _shuffled(k, self.count, self.seed, epoch) * self.seq_len + _epoch_seeds(self.seed, epoch)[1] % room
        return start, start + self.seq_len + 1


@dataclass(frozen=True)
class _Documents:
    """The documents of the stream as numbered examples: in order, or with a seed, shuffled within each epoch."""

    stream: TokenStream
    seq_len: int
    seed: int | None = None
    masked = True

    def __post_init__(self) -> None:
        # A row holds seq_len tokens, and the label of the last one.
        _require_documents(self.stream, self.seq_len + 1)

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
class _PackedRows:
    """The rows of packed documents as numbered examples: in order, or shuffled within each epoch if `seed` is given."""

    stream: TokenStream
    seq_len: int
    seed: int | None = None

    def __post_init__(self) -> None:
        _require_documents(self.stream, self.seq_len)
        if not self.count:  # computes the packing now, because several threads would compute it at the same time
            raise DataError(f"the {'validation data' if self.seed is None else 'data'} has no tokens")

    @cached_property
    def packing(self) -> Packing:
        assert self.stream.document_ends is not None
        return packing(self.stream.document_ends, self.seq_len)

    @property
    def count(self) -> int:
        return len(self.packing)

    def spans(self, number: int) -> list[tuple[int, int]]:
        """Return start and stop in the stream of each piece of example `number`."""
        k = number
        if self.seed is not None:
            epoch, k = divmod(number, self.count)
            k = _shuffled(k, self.count, self.seed, epoch)
        return self.packing.spans(k)


@dataclass(frozen=True)
class _Mixed:
    """The examples of several sources, mixed in fixed proportions."""

    sources: tuple[_Source, ...]
    examples_per_block: tuple[int, ...]
    seq_len: int
    seed: int


_Source = _Windows | _Documents | _PackedRows
_SOURCES: dict[Examples, Callable[..., _Source]] = {
    "stream": _Windows,
    "documents": _Documents,
    "packed": _PackedRows,
}


def _training_source(stream: TokenStream | Mixture, examples: Examples, seq_len: int, seed: int) -> _Source | _Mixed:
    of_stream = _SOURCES[examples]
    if isinstance(stream, TokenStream):
        return of_stream(stream, seq_len, seed)
    sources = tuple(of_stream(one, seq_len, seed) for one in stream.streams)
    return _Mixed(sources, stream.examples_per_block, seq_len, seed)


def _require_documents(stream: TokenStream, max_tokens: int) -> None:
    """Raise `DataError` if the document ends are unknown, or if a document with a completion would be truncated."""
    ends = stream.document_ends
    if ends is None:
        raise DataError(
            "these token files do not store where documents end, so documents cannot be examples; "
            "use --examples stream, or give the text"
        )
    if stream.is_masked and (longest := int(np.diff(ends, prepend=0).max(initial=0))) > max_tokens:
        raise DataError(
            f"a record has {longest} tokens, and a row has room for {max_tokens}; choose a larger seq_len. If the data "
            "are records, --skip-bad-records leaves such records out (`RecordOptions.max_tokens` and `skip_bad`)"
        )


@dataclass(frozen=True)
class _Batches:
    """Training batches as a random-access source for grain: item s is the batch of step s."""

    examples: _Source | _Mixed
    batch_size: int
    rows: slice

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size

    def __getitem__(self, step: int) -> Batch:
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)[self.rows]
        if isinstance(self.examples, _Mixed):
            return _mixed_batch(self.examples, numbers)
        return _batch(self.examples, numbers)


@dataclass(frozen=True)
class _EvaluationBatches:
    """Evaluation batches as a random-access source for grain."""

    examples: _Source
    indices: np.ndarray
    batch_size: int
    rows: slice

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        of_batch = self.indices[number * self.batch_size : (number + 1) * self.batch_size]
        # Fill with a copy of an example, because a row of padding alone would have nothing to attend to.
        full = np.concatenate([of_batch, np.repeat(of_batch[:1], self.batch_size - len(of_batch))])
        real = np.arange(self.batch_size) < len(of_batch)
        batch = _batch(self.examples, full[self.rows].tolist())
        batch["labels"][~real[self.rows]] = IGNORE_INDEX
        return batch


def _mixed_batch(mixed: _Mixed, numbers: Sequence[int]) -> Batch:
    """Return a batch whose rows are these examples of a mixture, with one read for each source."""
    batch: Batch = {}
    for index, rows, own_numbers in places(numbers, mixed.examples_per_block, mixed.seed):
        for name, values in _batch(mixed.sources[index], own_numbers).items():
            batch.setdefault(name, np.empty((len(numbers), mixed.seq_len), np.int32))[rows] = values
    return batch


def _batch(examples: _Source, numbers: Sequence[int]) -> Batch:
    """Return a batch whose rows are these examples. Each window or document has 1 to seq_len + 1 tokens."""
    if isinstance(examples, _PackedRows):
        return packed_batch(examples.stream, [examples.spans(number) for number in numbers], examples.seq_len)
    spans = [*map(examples.span, numbers)]
    tokens = examples.stream.read_spans(spans)
    targets = examples.stream.read_targets(spans, tokens)
    if not examples.masked:
        return {"input_ids": np.stack(tokens)[:, :-1].copy(), "labels": np.stack(targets)[:, 1:].copy()}
    ids = np.zeros((len(tokens), examples.seq_len), np.int32)
    labels, mask = np.full_like(ids, IGNORE_INDEX), np.zeros_like(ids)
    for row, (document, target) in enumerate(zip(tokens, targets, strict=True)):
        ids[row, : len(document)] = document[: examples.seq_len]
        labels[row, : len(document) - 1] = target[1:]
        mask[row, : len(document)] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def _shuffled(k: int, count: int, seed: int, epoch: int) -> int:
    """Return the k-th example of an epoch."""
    if count <= _MAX_STORED_ORDER:
        return int(_order(count, seed, epoch)[k])
    # If the largest index is a power of four, grain 0.2.18 never returns it, and returns another index twice. Therefore
    # shuffle one more index, and shuffle again whenever the result is that index. The
    # remaining indices are then permuted.
    largest = count - 1 if (count - 1) & (count - 2) else count
    while (k := index_shuffle(k, max_index=largest, seed=_epoch_seeds(seed, epoch)[0], rounds=4)) >= count:
        pass
    return k


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    # numpy guarantees that the raw output of a bit generator never changes, but not the result of a shuffle.
    return np.argsort(np.random.PCG64(_epoch_seeds(seed, epoch)[0]).random_raw(count), kind="stable")


@lru_cache(maxsize=16)
def _epoch_seeds(seed: int, epoch: int) -> tuple[int, int]:
    """Return two random numbers below 2**32 for an epoch: the seed of its order, and the offset of its windows."""
    order, offset = np.random.SeedSequence([seed, epoch]).generate_state(2).tolist()
    return order, offset

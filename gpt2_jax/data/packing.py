"""Documents packed into rows of `seq_len` tokens, so that little of a batch is padding.

A document longer than `seq_len` is cut into pieces. The pieces are packed by best-fit decreasing (Johnson 1973): the
longest piece comes first, and each goes to the row in which it leaves the least room. A row is a sequence of segments
for the model's `segment_ids`; each segment starts at position 0 and attends only to itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
from jaxtyping import Int

from bridge import IGNORE_INDEX
from gpt2_jax.data.tokens.stream import TokenStream

WINDOW = 2**16
"""Pieces that are packed together. Larger groups would hardly reduce padding: at this size, few rows are not full."""


@dataclass(frozen=True)
class Packing:
    """The pieces of each row, 12 bytes each, and 8 bytes per row.

    Attributes:
        starts: where each piece starts in the stream, row after row.
        lengths: the tokens of each piece.
        ends: for each row, the number of pieces up to its end.
    """

    starts: Int[np.ndarray, " N"]
    lengths: Int[np.ndarray, " N"]
    ends: Int[np.ndarray, " R"]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ends)

    def spans(self, row: int) -> list[tuple[int, int]]:
        """Return start and stop in the stream of each piece of a row."""
        pieces = slice(self.ends[row - 1] if row else 0, self.ends[row])
        starts = self.starts[pieces]
        return list(zip(starts.tolist(), (starts + self.lengths[pieces]).tolist(), strict=True))


def packing(document_ends: Int[np.ndarray, " N"], seq_len: int) -> Packing:
    """Pack documents, given the position one past the last token of each. The last two results are cached.

    The result depends on the arguments alone, so all processes of a run have the same one.
    """
    return _packing(document_ends.astype(np.int64).tobytes(), seq_len)


@lru_cache(maxsize=2)  # the training data and the validation data
def _packing(document_ends: bytes, seq_len: int) -> Packing:
    starts, lengths = _pieces(np.frombuffer(document_ends, np.int64), seq_len)
    row_of_piece, rows = np.empty(len(starts), np.int64), 0
    for begin in range(0, len(starts), WINDOW):
        window = slice(begin, begin + WINDOW)
        in_window = best_fit_decreasing(lengths[window], seq_len)
        row_of_piece[window] = rows + in_window
        rows += int(in_window.max()) + 1
    order = np.argsort(row_of_piece, kind="stable")
    ends = np.cumsum(np.bincount(row_of_piece, minlength=rows))
    return Packing(starts[order], lengths[order], ends)


def best_fit_decreasing(lengths: Int[np.ndarray, " N"], capacity: int) -> Int[np.ndarray, " N"]:
    """Return the row of each piece.

    Args:
        lengths: the tokens of each piece, 1 to `capacity`.

    Example:
        >>> best_fit_decreasing(np.array([3, 6, 2, 7, 4]), 10).tolist()
        [0, 1, 2, 0, 1]
    """
    rows_with_room: list[list[int]] = [[] for _ in range(capacity)]  # by the number of free tokens
    free_sizes, rows = 0, 0  # bit n of free_sizes: whether a row has n free tokens
    row_of_piece = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if large_enough := free_sizes >> length:
            room = length + (large_enough & -large_enough).bit_length() - 1  # the lowest bit
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                free_sizes ^= 1 << room
        else:
            room, row, rows = capacity, rows, rows + 1
        row_of_piece[piece] = row
        if left := room - length:
            rows_with_room[left].append(row)
            free_sizes |= 1 << left
    return row_of_piece


def packed_batch(
    stream: TokenStream, rows: Sequence[Sequence[tuple[int, int]]], seq_len: int
) -> dict[str, Int[np.ndarray, "B T"]]:
    """Return a batch of `input_ids`, `labels` and `segment_ids` [B, T].

    Segments are numbered from 1 in each row, and padding is 0. The label of a token is the next token of its segment,
    or `IGNORE_INDEX` if that does not count in the loss. The last token of a segment has `IGNORE_INDEX` too.

    Args:
        rows: for each row, start and stop in the stream of its pieces.
    """
    ids = np.zeros((len(rows), seq_len), np.int32)
    labels, segments = np.full_like(ids, IGNORE_INDEX), np.zeros_like(ids)
    places = [(row, number) for row, spans in enumerate(rows) for number in range(1, len(spans) + 1)]
    spans = [*chain.from_iterable(rows)]
    pieces = stream.read_spans(spans)
    end = 0
    for (row, number), piece, target in zip(places, pieces, stream.read_targets(spans, pieces), strict=True):
        begin = end if number > 1 else 0
        end = begin + len(piece)
        ids[row, begin:end] = piece
        labels[row, begin : end - 1] = target[1:]
        segments[row, begin:end] = number
    return {"input_ids": ids, "labels": labels, "segment_ids": segments}


def _pieces(document_ends: Int[np.ndarray, " N"], seq_len: int) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """Return the starts and the lengths of the pieces, in the order of the stream."""
    sizes = np.diff(document_ends, prepend=0)
    counts = -(-sizes // seq_len)
    is_last_piece = np.cumsum(counts)[counts > 0] - 1
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of the piece in its document
    starts = np.repeat(document_ends - sizes, counts) + number * seq_len
    lengths = np.full(len(starts), seq_len, np.int32)
    lengths[is_last_piece] = document_ends[counts > 0] - starts[is_last_piece]
    return starts, lengths

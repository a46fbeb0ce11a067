"""Named arrays that are read one at a time, and the float types that cross the bridge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from bridge.errors import ConversionError, quoted

ALIGNMENT = 64
"""Bytes. JAX on CPU adopts a numpy buffer aligned to this without copying it."""

MOST_RANK = 16
"""Limit on the axes of a stored tensor. The deepest parameter has 5; a malicious file may declare any number."""

_COLUMNS = 128


@dataclass(frozen=True)
class LazyTensor:
    """One stored tensor: what it is, without its data, and how to read that."""

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    read_rows: Callable[[int, int], np.ndarray] | None = None
    """Reads these rows (of the first axis, from one up to another) alone, where that is less work than all."""

    def rows(self, start: int, stop: int) -> np.ndarray:
        """A part of what `read` gives."""
        if self.read_rows is None or (start, stop) == (0, self.shape[0]):
            return self.read()[start:stop]
        return self.read_rows(start, stop)

    @classmethod
    def of(cls, array: np.ndarray) -> LazyTensor:
        """An array in memory, seen read-only: whoever trains on it must not change its owner's copy."""
        view = array.view()
        view.flags.writeable = False
        return cls(view.dtype, view.shape, lambda: view)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def transposed(entry: LazyTensor) -> LazyTensor:
    """The transpose of a matrix: `[out, in]` for `[in, out]`. What is read is a view of what `entry` reads."""
    return LazyTensor(entry.dtype, entry.shape[::-1], lambda: entry.read().T)


def first_rows(entry: LazyTensor, rows: int) -> LazyTensor:
    """Return the tensor without vocabulary padding. Unchanged if it has at most `rows` rows."""
    if not entry.shape or entry.shape[0] <= rows:
        return entry
    return LazyTensor(entry.dtype, (rows, *entry.shape[1:]), lambda: entry.read()[:rows])


class LazyTensorMap(Mapping[str, np.ndarray]):
    """A mapping from name to array in which every look-up reads the array anew.

    Nothing is kept, so a caller that drops each array before it takes the next holds one at a time.
    """

    def __init__(self, entries: Mapping[str, LazyTensor]) -> None:
        self.entries = dict(entries)

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray]) -> LazyTensorMap:
        """Arrays in memory under the same interface; lazy tensors are returned as they are."""
        if isinstance(tensors, LazyTensorMap):
            return tensors
        return cls({name: LazyTensor.of(_as_array(name, array)) for name, array in tensors.items()})

    def __getitem__(self, name: str) -> np.ndarray:
        return self.entries[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self.entries  # Mapping's own would read the array to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        total = sum(entry.nbytes for entry in self.entries.values())
        return f"<{len(self)} tensors, {total:,} bytes, read on demand>"


def _as_array(name: str, array: Any) -> np.ndarray:
    try:
        return np.asarray(array)
    except (TypeError, RuntimeError) as error:  # torch: bfloat16, a tensor that requires grad or is on a GPU
        raise ConversionError(
            f"{quoted(name)} is not a numpy array and does not become one ({error}); for a PyTorch model use "
            "gpt2_torch.checkpoint_from_model"
        ) from error


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """`np.empty` on an `ALIGNMENT`-byte boundary, so that JAX on CPU can take the buffer over."""
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def contiguous(array: np.ndarray) -> np.ndarray:
    """The same array, row by row in memory; a copy only where it is not.

    A transpose is copied some columns at a time, which keeps what is read in the cache: 2.5 times as fast as at once.
    """
    if array.flags.c_contiguous:
        return array
    copy = aligned_empty(array.shape, array.dtype)
    for start in range(0, array.shape[-1], _COLUMNS):
        copy[..., start : start + _COLUMNS] = array[..., start : start + _COLUMNS]
    return copy


def same_bytes(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits. NaN equals itself; 0.0 does not equal -0.0."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    bits, block = f"u{a.dtype.itemsize}", 4096  # comparing all at once would allocate a third array
    x, y = (np.ascontiguousarray(entry.read()).view(bits) for entry in (a, b))
    return all(np.array_equal(x[i : i + block], y[i : i + block]) for i in range(0, len(x), block))


def are_sizes(values: Any, sequence: type[list] | type[tuple], *, most: int = 2**63 - 1) -> TypeGuard[Sequence[int]]:
    """Whether an untrusted value is a `sequence` of at most `MOST_RANK` whole numbers from 0 to `most`."""
    return (
        type(values) is sequence
        and len(values) <= MOST_RANK
        and all(type(value) is int and 0 <= value <= most for value in values)
    )

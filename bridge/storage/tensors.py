"""Tensors that are read on access, and operations on their arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from bridge.errors import ConversionError, quoted

ALIGNMENT = 64
"""Bytes. JAX on CPU uses a numpy buffer with this alignment without copying it."""

MOST_RANK = 16
"""Limit on the axes of a stored tensor. Parameters have at most 5; a malicious file may declare any number."""

_COLUMNS = 128


@dataclass(frozen=True)
class LazyTensor:
    """A stored tensor: its dtype and shape, and a function that reads the array."""

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    read_rows: Callable[[int, int], np.ndarray] | None = None
    """`read_rows(start, stop)` reads rows start ... stop - 1 of the first axis. None if it is no faster than `read`."""

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Return rows start ... stop - 1 of the first axis."""
        if self.read_rows is None or (start, stop) == (0, self.shape[0]):
            return self.read()[start:stop]
        return self.read_rows(start, stop)

    @classmethod
    def of(cls, array: np.ndarray) -> LazyTensor:
        """Wrap an array in memory. `read` returns a read-only view, so that training cannot change the array."""
        view = array.view()
        view.flags.writeable = False
        return cls(view.dtype, view.shape, lambda: view)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def transposed(entry: LazyTensor) -> LazyTensor:
    """Return the transpose of a matrix, for example `[out, in]` for `[in, out]`. Reading it returns a view."""
    return LazyTensor(entry.dtype, entry.shape[::-1], lambda: entry.read().T)


def first_rows(entry: LazyTensor, rows: int) -> LazyTensor:
    """Return the tensor without vocabulary padding. Unchanged if it has at most `rows` rows."""
    if not entry.shape or entry.shape[0] <= rows:
        return entry
    return LazyTensor(entry.dtype, (rows, *entry.shape[1:]), lambda: entry.read()[:rows])


class LazyTensorMap(Mapping[str, np.ndarray]):
    """A mapping from name to array. Each access reads the array again and keeps nothing.

    A caller that drops each array before it reads the next holds one array in memory.
    """

    def __init__(self, entries: Mapping[str, LazyTensor]) -> None:
        self.entries: dict[str, LazyTensor] = dict(entries)

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray]) -> LazyTensorMap:
        """Wrap a mapping of arrays in memory. A `LazyTensorMap` is returned unchanged."""
        if isinstance(tensors, LazyTensorMap):
            return tensors
        return cls({name: LazyTensor.of(_as_array(name, array)) for name, array in tensors.items()})

    def __getitem__(self, name: str) -> np.ndarray:
        return self.entries[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self.entries  # the default of Mapping would read the array

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        total = sum(entry.nbytes for entry in self.entries.values())
        return f"<{len(self)} tensors, {total:,} bytes, read on demand>"


def _as_array(name: str, array: Any) -> np.ndarray:
    if isinstance(array, Mapping):
        raise ConversionError(
            f"{quoted(name)} is a dictionary, not an array; convert a Flax parameter tree first, with "
            "bridge.to_torch(params, config)"
        )
    try:
        return np.asarray(array)
    except (TypeError, RuntimeError) as error:  # torch: bfloat16, a tensor that requires grad or is on a GPU
        raise ConversionError(
            f"{quoted(name)} is not a numpy array and cannot be converted to one ({error}); for a PyTorch model use "
            "gpt2_torch.checkpoint_from_model"
        ) from error


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Like `np.empty`, but aligned to `ALIGNMENT` bytes, so that JAX on CPU can use the buffer without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def contiguous(array: np.ndarray) -> np.ndarray:
    """Return the array in row-major order. It is copied only if it is not in that order already.

    A transpose is copied 128 columns at a time, so that the source stays in the cache: 2.5 times as fast as one copy.
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


def are_sizes(
    values: Any, sequence: type[list[Any]] | type[tuple[Any, ...]], *, most: int = 2**63 - 1
) -> TypeGuard[Sequence[int]]:
    """Whether an untrusted value is a `sequence` of at most `MOST_RANK` whole numbers from 0 to `most`."""
    return (
        type(values) is sequence
        and len(values) <= MOST_RANK
        and all(type(value) is int and 0 <= value <= most for value in values)
    )

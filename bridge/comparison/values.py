"""The comparison of the values of two arrays of the same shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bridge.finite import count_not_finite
from bridge.storage.tensors import contiguous

Status = Literal[
    "identical", "equal values", "rounded", "permuted", "transposed", "different", "only in A", "only in B"
]
"""How a tensor compares.

`identical`: equal bits. `equal values`: every value is equal, but the dtype or the sign of a zero is not. `rounded`:
equal after the wider dtype is cast to the narrower one. `permuted`: the heads or feed-forward units of the layer have
another order, which does not change the function. `transposed`: the transpose of the other side's bits.
"""

_BLOCK = 2**20
"""Number of values compared at a time, so that temporary arrays are small."""


@dataclass(frozen=True)
class Values:
    """How two arrays compare."""

    status: Status
    different: int = 0
    """The number of values that differ, beyond rounding to the narrower dtype."""
    relative_l2: float = 0.0
    """||B - A|| / ||A|| in L2 norm. Infinite if a value that differs is NaN or infinite on either side."""
    largest: float = 0.0
    """max |B - A|. Infinite in the same case."""
    not_finite: tuple[int, int] = (0, 0)
    """The number of values that are NaN or infinite, on each side."""


def compare_values(a: np.ndarray, b: np.ndarray) -> Values:
    """Compare two float arrays of the same shape.

    In the same dtype, values are equal if their bits are, so NaN equals itself. In different dtypes, NaN equals NaN.
    """
    x, y = (contiguous(array).reshape(-1) for array in (a, b))
    blocks = [slice(start, start + _BLOCK) for start in range(0, x.size, _BLOCK)]
    not_finite = count_not_finite(x), count_not_finite(y)
    if x.dtype == y.dtype and not any(differs(x[block], y[block]).any() for block in blocks):
        return Values("identical", not_finite=not_finite)
    count, squares, scale, largest, are_equal = 0, 0.0, 0.0, 0.0, True
    with np.errstate(over="ignore", invalid="ignore"):
        for block in blocks:
            wide_x, wide_y = x[block].astype(np.float64), y[block].astype(np.float64)
            beyond_rounding = differs(x[block], y[block])
            count += int(np.count_nonzero(beyond_rounding))
            unequal = wide_x != wide_y
            if x.dtype == y.dtype:
                unequal &= beyond_rounding
            else:
                unequal &= ~(np.isnan(wide_x) & np.isnan(wide_y))
            scale += float(np.square(wide_x[np.isfinite(wide_x)]).sum())
            if unequal.any():
                are_equal = False
                distances = np.abs(wide_y - wide_x)[unequal]
                squares += float(np.square(distances).sum())
                largest = float(np.maximum(largest, distances.max()))  # NaN stays NaN
    if are_equal:
        return Values("equal values", not_finite=not_finite)
    status: Status = "different" if count else "rounded"
    return Values(status, count, _ratio(squares, scale), _or_infinity(largest), not_finite)


def differs(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return where values differ: in their bits, or after the wider dtype is cast to the narrower one.

    float16 and bfloat16 are not cast to each other, because neither holds the values of the other.
    """
    is_mixed = x.dtype != y.dtype
    narrow = narrower(x.dtype, y.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        x, y = (array.astype(narrow, copy=False) for array in (x, y))
    different: np.ndarray = x.view(f"u{narrow.itemsize}") != y.view(f"u{narrow.itemsize}")
    if is_mixed and different.any():
        different &= ~(np.isnan(x) & np.isnan(y))
    return different


def narrower(a: np.dtype, b: np.dtype) -> np.dtype:
    """Return the dtype in which values are compared: the one with fewer bits, or float32 for two with 16 bits."""
    if a != b and a.itemsize == b.itemsize:
        return np.dtype(np.float32)
    return min(a, b, key=lambda dtype: dtype.itemsize)


def _ratio(squares: float, scale: float) -> float:
    norm = math.sqrt(scale)
    return _or_infinity(math.sqrt(squares) / norm) if norm else math.inf


def _or_infinity(value: float) -> float:
    return value if math.isfinite(value) else math.inf

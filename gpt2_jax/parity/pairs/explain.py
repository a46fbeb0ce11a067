"""What differs between two arrays, in words, from their values alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np

_ROUNDED = (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16), ("float32", np.float32))
_RESIDUAL = 1e-3


def explain(left: np.ndarray, right: np.ndarray, blocks: Sequence[str] = ()) -> str:
    """How `right` can be obtained from `left`, or "" if no simple operation does it.

    Args:
        blocks: the names of the equal blocks along the first axis, such as the gates of an LSTM.

    >>> explain(np.eye(3)[[1, 2, 0]], np.eye(3)[[1, 2, 0]].T)
    'copied without its transpose'
    >>> explain(np.arange(3.0), 2 * np.arange(3.0))
    'the right side is 2 times the left side'
    """
    a, b = left.astype(np.float64), right.astype(np.float64)
    if a.shape != b.shape:
        return _transposed(a, b)
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or not a.size:
        return ""
    return next(filter(None, _explanations(a, b, blocks)), "")


def _explanations(a: np.ndarray, b: np.ndarray, blocks: Sequence[str]) -> Iterator[str]:
    yield _constant(a, b)
    for name, dtype in _ROUNDED:
        for x, y, side in ((a, b, "right"), (b, a, "left")):
            if np.array_equal(x.astype(dtype).astype(np.float64), y):
                yield f"the {side} side is rounded to {name}"
    yield _transposed(a, b)
    yield _flipped(a, b)
    yield from _permuted(a, b, blocks)
    yield _affine(a, b)


def _constant(a: np.ndarray, b: np.ndarray) -> str:
    for x, side in ((a, "left"), (b, "right")):
        if x.size > 1 and (x == x.flat[0]).all():
            other = b if side == "left" else a
            if not (other == other.flat[0]).all():
                return f"the {side} side is {x.flat[0]:g} everywhere"
    if a.size > 1 and (a == a.flat[0]).all() and (b == b.flat[0]).all():
        return f"{a.flat[0]:g} on the left side and {b.flat[0]:g} on the right side, everywhere"
    return ""


def _transposed(a: np.ndarray, b: np.ndarray) -> str:
    if a.ndim != b.ndim or not 2 <= a.ndim <= 5 or sorted(a.shape) != sorted(b.shape):
        return ""
    for order in itertools.permutations(range(a.ndim)):
        if order != tuple(range(a.ndim)) and np.array_equal(a, b.transpose(order)):
            return "copied without its transpose" if a.ndim == 2 else f"equal after a transpose by {order}"
    return ""


def _flipped(a: np.ndarray, b: np.ndarray) -> str:
    for count in range(1, min(a.ndim, 5) + 1):
        for axes in itertools.combinations(range(a.ndim), count):
            if np.array_equal(a, np.flip(b, axes)):
                return (
                    f"reversed along axes {', '.join(map(str, axes))}"
                    if count > 1
                    else f"reversed along axis {axes[0]}"
                )
    return ""


def _permuted(a: np.ndarray, b: np.ndarray, blocks: Sequence[str]) -> Iterator[str]:
    """Slices along one axis that are in another order."""
    for axis in range(a.ndim):
        x, y = (np.ascontiguousarray(np.moveaxis(side, axis, 0)).reshape(side.shape[axis], -1) for side in (a, b))
        rows = {row.tobytes(): k for k, row in enumerate(x)}
        if len(rows) < len(x) or len(x) < 2:
            continue
        order = [rows.get(row.tobytes(), -1) for row in y]
        if sorted(order) == [*range(len(order))] and order != [*range(len(order))]:
            yield _order(order, axis, blocks)


def _order(order: list[int], axis: int, blocks: Sequence[str]) -> str:
    """Describe a permutation by its largest blocks, or as an interleaving."""
    n = len(order)
    sizes = [size for size in range(n // 2, 1, -1) if n % size == 0]
    for size in sizes:
        starts = order[::size]
        if all(start % size == 0 for start in starts) and order == [s + k for s in starts for k in range(size)]:
            names = [blocks[s // size] if len(blocks) * size == n and axis == 0 else str(s // size) for s in starts]
            return f"blocks of {size} along axis {axis} in the order {', '.join(names)}"
    for size in sizes:
        if order == [*np.arange(n).reshape(-1, size).T.flat]:
            return f"axis {axis} interleaved: every {size}th element is adjacent"
        for outer in sizes:
            if outer > size and outer % size == 0:
                inner = np.arange(n).reshape(n // outer, -1, size).swapaxes(1, 2)
                if order == [*inner.flat]:
                    return f"axis {axis} interleaved within blocks of {outer}: every {size}th element is adjacent"
    return f"axis {axis} in the order {', '.join(map(str, order))}" if n <= 16 else f"axis {axis} permuted"


def _affine(a: np.ndarray, b: np.ndarray) -> str:
    """A constant offset or factor that explains all but a thousandth of the difference."""
    difference = b - a
    scale = np.abs(difference).max()
    if a.size < 3 or not scale or not np.ptp(a):
        return ""
    if np.ptp(difference) <= _RESIDUAL * scale:
        return f"the right side is {np.mean(difference):+.6g} away from the left side, everywhere"
    ratio = float(np.vdot(a, b) / max(np.vdot(a, a), np.finfo(np.float64).tiny))
    if ratio and np.abs(b - ratio * a).max() <= _RESIDUAL * scale:
        return f"the right side is {ratio:.6g} times the left side"
    return ""


def explain_update(before: np.ndarray, left: np.ndarray, right: np.ndarray) -> str:
    """How the update of a running average differs between the right side and the left side.

    A side computes (1 - m) before + m x. If the right side uses k m and the same x, its update is k times the other. If
    it uses the same m and x / k, `right` is a linear combination of `left` and `before`, from which k follows.
    """
    a, b = left - before, right - before
    ratio = float(np.vdot(a, b) / max(np.vdot(a, a), np.finfo(np.float64).tiny))
    if np.abs(b - ratio * a).max() <= _RESIDUAL * np.abs(b - a).max():
        return f"the right side moves {ratio:.6g} times as far as the left side: another momentum"
    columns = np.stack([left.reshape(-1), before.reshape(-1)], 1)
    (scale, _), residual, *_ = np.linalg.lstsq(columns, right.reshape(-1), rcond=None)
    if left.size > 2 and residual.size and residual[0] <= (_RESIDUAL * np.abs(right - left).max()) ** 2:
        count = 1 / (1 - scale) if scale < 1 - _RESIDUAL**2 else 0.0
        if count > 1.5 and abs(count - round(count)) < _RESIDUAL * count:
            return (
                f"the left side averages the unbiased variance of {round(count)} values, the right side the biased one"
            )
    return ""


def same_as_another(array: np.ndarray, others: Mapping[str, np.ndarray], tolerance: float = 0.0) -> str:
    """The name of the array with these values, or ""."""
    for name, other in others.items():
        if other.shape == array.shape and other.size > 1 and np.abs(other - array).max() <= tolerance:
            if np.ptp(other):
                return name
    return ""


def where_differs(a: np.ndarray, b: np.ndarray, bound: float) -> str:
    """The element with the largest difference, and which part of the array differs.

    >>> where_differs(np.zeros((2, 3)), np.array([[0, 0, 0], [0, 0.5, 1]]), 0.1)
    '[1, 2]: 0 and 1; 2 of 6 elements, with axis 0 = 1, axis 1 from 1'
    """
    with np.errstate(invalid="ignore"):
        difference = np.where(a == b, 0.0, np.abs(a - b))
    wrong = ~(difference <= bound)
    if not a.ndim or not wrong.any():
        return _values(float(a), float(b)) if not a.ndim and wrong else ""
    worst = np.unravel_index(np.where(np.isnan(difference), np.inf, difference).argmax(), a.shape)
    place, values = ", ".join(map(str, worst)), _values(float(a[worst]), float(b[worst]))
    text = f"[{place}]: {values}; {wrong.sum()} of {a.size} elements"
    parts = [part for axis in range(a.ndim) if (part := _extent(wrong, axis))]
    return f"{text}, with {', '.join(parts)}" if parts else text


def _values(a: float, b: float) -> str:
    left, right = f"{a:.6g}", f"{b:.6g}"
    return f"{left} and {right}" if left != right else f"{left}, off by {b - a:.2g}"


def _extent(wrong: np.ndarray, axis: int) -> str:
    """Which indices of an axis are affected, or "" for all or no contiguous range."""
    affected = np.flatnonzero(np.any(wrong, axis=tuple(k for k in range(wrong.ndim) if k != axis)))
    first, last, size = int(affected[0]), int(affected[-1]), wrong.shape[axis]
    if len(affected) != last - first + 1 or len(affected) == size:
        return ""
    if first == last:
        return f"axis {axis} = {first}"
    if last == size - 1:
        return f"axis {axis} from {first}"
    return f"axis {axis} from {first} to {last}"

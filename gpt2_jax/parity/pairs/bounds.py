"""Tolerances of a comparison of two sides, derived from the depth, the width and the dtype of the computation.

The unit of all bounds is the unit round-off u of a dtype: 2^-53 for float64, 2^-24 for float32 and 2^-8 for bfloat16.

float64 decides whether two functions are equal. Correct implementations differ by rounding alone. How much depends on
the model: each layer adds errors and amplifies earlier ones. So the error of each side in float32, against its own
float64, is measured and scaled: the same operations make the same number of rounding errors, each u64 / u32 = 2^-29
times as large. Small arrays can be exact in float32 by chance. So an error counts as at least sqrt(L) u, a random walk
of one rounding for each of L layers, and that of a gradient as at least the median of all gradients. Where no side can
compute in float32, an error counts as sqrt(K L) u, for sums of K terms (Higham, "Accuracy and Stability of Numerical
Algorithms", section 2.8).

In float32 and bfloat16, the error of the right side must not be much larger than that of the left side. One side may
accumulate a sum over N rows and positions of a batch, in a gradient or a mean, sequentially, and the other in parts. So
an error counts as at least sqrt(max(L, N)) u. Elementary functions such as tanh may be accurate to several units on one
side and to one on the other. A model can amplify this. The difference of the sides in float64 shows by how much, so an
error also counts as at least that, times u / u64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gpt2_jax.parity.metrics import rms
from gpt2_jax.parity.tolerances import ROUNDOFF_BF16, ROUNDOFF_FP32

ROUNDOFF: Mapping[str, float] = {"float64": 2.0**-53, "float32": ROUNDOFF_FP32, "bfloat16": ROUNDOFF_BF16}
"""Unit round-off: half the spacing at 1."""

MARGIN = 12.0
"""Allowed difference of two sides, relative to the error of one. Both have errors (sqrt(2)). The largest of many errors
of one is up to twice that of the other. Sequential accumulation has sqrt(16) times the error of 16 parallel
accumulators, as in the vector units of a CPU."""

RATIO = 8.0
"""Allowed error of one side in float32 or bfloat16, relative to that of the other: `MARGIN` without the sqrt(2)."""

Norm = Callable[[np.ndarray], float]


@dataclass(frozen=True)
class Size:
    """The size of a computation."""

    depth: int
    """The number of matrices and convolutions (L), at least 1."""
    width: int
    """The largest number of terms in a product with a matrix or a convolution (K), at least 1."""
    rows: int = 1
    """The number of rows of a batch times the number of positions in a row (N), at least 1."""

    @classmethod
    def of(cls, shapes: Iterable[tuple[int, ...]], inputs: Sequence[np.ndarray] = ()) -> Size:
        """The size of a model with parameters of these shapes, on these inputs.

        Positions are all axes of integer inputs, the last two axes of images [N, C, H, W], and all axes of other inputs
        but the last.

        >>> Size.of([(64, 16), (64,), (8, 64, 3, 3)], [np.zeros((2, 16))])
        Size(depth=2, width=576, rows=2)
        """
        weights = [shape for shape in shapes if len(shape) > 1]
        terms = [max(shape) if len(shape) == 2 else math.prod(shape[1:]) for shape in weights]
        rows = [
            x.size // (1 if x.dtype.kind in "iub" or x.ndim < 2 else x.shape[1 if x.ndim == 4 else -1] or 1)
            for x in inputs
        ]
        return cls(max(1, len(weights)), max([1, *terms]), max([1, *rows]))


@dataclass(frozen=True)
class Bound:
    """A tolerance and its reason."""

    value: float
    reason: str


def deviation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b| in float64, where equal infinities do not differ."""
    with np.errstate(invalid="ignore"):
        return np.where(a == b, 0.0, np.abs(a.astype(np.float64) - b.astype(np.float64)))


def largest(x: np.ndarray) -> float:
    """max |x|, or 0 for an empty array."""
    return float(np.abs(x).max(initial=0.0))


def l2(x: np.ndarray) -> float:
    return float(np.linalg.norm(x.reshape(-1)))


def rounding_error(exact: np.ndarray, in_float32: np.ndarray, norm: Norm = largest) -> float:
    """The error of a side in float32 against its own float64. 0 if it overflows."""
    error = norm(deviation(in_float32, exact))
    return error if math.isfinite(error) else 0.0


def fp64_bound(
    exact: np.ndarray, errors: Sequence[float], size: Size, norm: Norm = largest, typical: float = 0.0
) -> Bound:
    """The tolerance of the difference of two sides in float64.

    Args:
        exact: what the reference computes in float64.
        errors: the `rounding_error` of each side that can compute in float32, the reference first.
        norm: the norm of the difference.
        typical: the `typical_error` of arrays of the same kind. An error counts as at least that.
    """
    u, scale = ROUNDOFF["float64"], norm(np.where(np.isfinite(exact), exact, 0.0))
    if not errors:
        units = math.sqrt(size.width * size.depth)
        return Bound(MARGIN * units * u * scale, f"{MARGIN:g} x sqrt(K L) u, K={size.width}, L={size.depth}, u=2^-53")
    # The side under test must not raise its own tolerance, so its error counts as at most `RATIO` times the first one.
    first = max(errors[0] / ROUNDOFF["float32"], typical * scale, math.sqrt(size.depth) * scale)
    measured = max(min(max(errors) / ROUNDOFF["float32"], RATIO * first), typical * scale)
    if measured > math.sqrt(size.depth) * scale:
        return Bound(MARGIN * measured * u, f"{MARGIN:g} x the fp32 error x 2^-29")
    return Bound(MARGIN * math.sqrt(size.depth) * u * scale, f"{MARGIN:g} x sqrt(L) u, L={size.depth}, u=2^-53")


def typical_error(exact: Sequence[np.ndarray], in_float32: Sequence[np.ndarray], norm: Norm) -> float:
    """The median error of arrays in float32 relative to their norms, in units of the round-off.

    The gradients of one pass have similar errors, because each is a product of the same backward pass. The gradient of
    a small parameter can be exact by chance, and its own error is then not representative.
    """
    errors = [norm(deviation(a, b)) / norm(b) for a, b in zip(in_float32, exact, strict=True) if norm(b)]
    return float(np.median(errors)) / ROUNDOFF["float32"] if errors else 0.0


def usual_size(gradients: Sequence[np.ndarray]) -> float:
    """The median of the root mean squares of gradients.

    A gradient can be zero except for rounding, as for the bias of keys. Its rounding error then comes from terms of
    this size.
    """
    return float(np.median([rms(x) for x in gradients if x.size] or [0.0]))


def error_ratio(
    exact: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    dtype: str,
    size: Size,
    norm: Norm = rms,
    typical: float = 0.0,
    scale: float = 0.0,
    difference: float = 0.0,
) -> tuple[float, float]:
    """The error of the right side in `dtype` relative to that of the left side, and its tolerance.

    Both errors are against float64. Each counts as at least the largest of sqrt(max(L, N)) u and the `typical` error,
    both relative to the norm of `exact` or to `scale`, and the `difference` of the sides in float64 times u / u64. That
    counts as at most `RATIO` times the error of the left side, so that the right side cannot raise its own tolerance.
    """
    least = (
        ROUNDOFF[dtype]
        * max(math.sqrt(max(size.depth, size.rows)), typical)
        * norm(np.where(np.isfinite(exact), exact, 0.0))
    )
    amplified = difference * ROUNDOFF[dtype] / ROUNDOFF["float64"]
    least = max(least, min(amplified, RATIO * max(norm(deviation(left, exact)), least)))
    ours, theirs = (max(norm(deviation(side, exact)), least) for side in (left, right))
    if not math.isfinite(ours) or not math.isfinite(theirs):
        return (1.0 if ours == theirs else math.inf), RATIO
    return (theirs / ours if ours else 1.0), RATIO

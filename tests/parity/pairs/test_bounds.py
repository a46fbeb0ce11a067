"""Tolerances follow from depth, width and dtype, and from the measured error in float32."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_jax.parity.pairs.bounds import (
    MARGIN,
    RATIO,
    Size,
    deviation,
    error_ratio,
    fp64_bound,
    l2,
    largest,
    rounding_error,
    typical_error,
)

X = np.random.default_rng(0).normal(size=(6, 8))
U = 2.0**-53


def test_the_size_of_a_model() -> None:
    size = Size.of([(4, 10), (10,), (8, 4, 3, 3)], [np.zeros((2, 3, 5, 5)), np.zeros((2, 7), int)])
    assert size == Size(depth=2, width=36, rows=50)
    assert Size.of([]) == Size(1, 1, 1)


def test_the_bound_is_the_float32_error_scaled_to_float64() -> None:
    bound = fp64_bound(X, [1e-5, 3e-5], Size(4, 100))
    assert bound.value == pytest.approx(MARGIN * 3e-5 * 2**-29, rel=1e-12)
    assert bound.reason == "12 x the fp32 error x 2^-29"


def test_the_bound_is_at_least_a_random_walk_through_the_layers() -> None:
    bound = fp64_bound(X, [0.0], Size(depth=16, width=100))
    assert bound.value == pytest.approx(MARGIN * 4 * U * largest(X), rel=1e-12)
    assert bound.reason == "12 x sqrt(L) u, L=16, u=2^-53"


def test_without_float32_the_bound_is_that_of_sums() -> None:
    bound = fp64_bound(X, [], Size(depth=4, width=100))
    assert bound.value == pytest.approx(MARGIN * 20 * U * largest(X), rel=1e-12)


def test_an_error_counts_as_at_least_the_typical_one() -> None:
    rounded = [X.astype(np.float32).astype(float), X.astype(np.float32).astype(float) * (1 + 2.0**-20), X]
    typical = typical_error([X, X, X], rounded, l2)
    assert typical == pytest.approx(l2(rounded[0] - X) / l2(X) / 2.0**-24)
    bound = fp64_bound(X, [0.0], Size(1, 1), l2, typical=100.0)
    assert bound.value == pytest.approx(MARGIN * 100 * U * l2(X), rel=1e-12)


def test_infinities_that_agree_have_no_error_and_no_scale() -> None:
    x = np.array([1.0, -np.inf])
    assert np.array_equal(deviation(x, x), [0, 0])
    assert fp64_bound(x, [0.0], Size(1, 1)).value == MARGIN * U
    assert rounding_error(np.array([1e300]), np.array([np.inf])) == 0.0


def test_the_ratio_of_errors() -> None:
    size = Size(depth=1, width=1, rows=1)
    noise = np.random.default_rng(1).normal(size=X.shape)
    ratio, limit = error_ratio(X, X + 1e-6 * noise, X + 5e-6 * noise, "float32", size)
    assert ratio == pytest.approx(5, rel=1e-6)
    assert limit == RATIO
    assert error_ratio(X, X, X, "float32", size)[0] == 1
    # 2^-24 for each of 100 rows is what a chain of additions loses.
    tiny = X + 2.0**-24 * noise
    assert error_ratio(X, X, tiny, "float32", Size(1, 1, rows=100))[0] == 1
    # A difference of 2^-50 in float64 is one of 2^-21 in float32.
    left = X + 2.0**-23
    assert error_ratio(X, left, X + 2.0**-20, "float32", size, difference=2.0**-50)[0] == pytest.approx(2, rel=1e-6)
    # It counts as at most RATIO times the error of the left side.
    assert error_ratio(X, left, X + 2.0**-18, "float32", size, difference=1.0)[0] == pytest.approx(4, rel=1e-6)
    assert error_ratio(X, X, X + np.inf, "float32", size)[0] == np.inf

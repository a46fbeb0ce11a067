"""The comparison of two arrays: bits, dtypes, NaN, infinity and signed zeros."""

from __future__ import annotations

import math
import warnings

import ml_dtypes
import numpy as np
import pytest

from bridge.comparison import values as values_module
from bridge.comparison.values import compare_values

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(autouse=True, params=[2**20, 7], ids=["one block", "several blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values_module, "_BLOCK", request.param)


def numbers(dtype: np.dtype | type = np.float32) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, 5)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, np.float64])
def test_equal_bits_are_identical(dtype: np.dtype | type) -> None:
    assert compare_values(numbers(dtype), numbers(dtype)).status == "identical"
    assert compare_values(numbers(dtype), np.asfortranarray(numbers(dtype))).status == "identical"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, np.float64])
def test_one_bit_is_found_and_measured(dtype: np.dtype | type) -> None:
    a, b = numbers(dtype), numbers(dtype)
    b.view(f"u{b.dtype.itemsize}")[3, 4] ^= 1
    found = compare_values(a, b)
    wide = a.astype(np.float64), b.astype(np.float64)
    assert (found.status, found.different) == ("different", 1)
    assert found.largest == abs(wide[0] - wide[1]).max() > 0
    assert found.relative_l2 == pytest.approx(np.linalg.norm(wide[1] - wide[0]) / np.linalg.norm(wide[0]), rel=1e-12)


@pytest.mark.parametrize(("wide", "narrow"), [(np.float64, np.float32), (np.float32, BF16), (np.float32, np.float16)])
def test_a_cast_copy_is_equal_up_to_dtype_in_both_directions(wide: type, narrow: np.dtype | type) -> None:
    a, b = numbers(wide), numbers(wide).astype(narrow)
    for found in (compare_values(a, b), compare_values(b, a)):
        assert (found.status, found.different) == ("rounded", 0)
        assert 0 < found.relative_l2 < 0.01
    b[0, 0] += narrow.type(1) if isinstance(narrow, np.dtype) else narrow(1)
    assert (compare_values(a, b).status, compare_values(a, b).different) == ("different", 1)


def test_a_wider_copy_has_equal_values() -> None:
    narrow = numbers(BF16)
    narrow[0, 0] = np.nan
    assert compare_values(narrow, narrow.astype(np.float32)).status == "equal values"
    assert compare_values(numbers(np.float16), numbers(np.float16).astype(np.float64)).status == "equal values"


def test_float16_and_bfloat16_are_compared_by_value() -> None:
    small = np.array([[1.0, -2.5, 0.0, np.nan]])
    assert compare_values(small.astype(np.float16), small.astype(BF16)).status == "equal values"
    assert compare_values(numbers(np.float16), numbers(BF16)).status == "different"


def test_a_zero_with_another_sign_is_an_equal_value() -> None:
    assert compare_values(np.zeros((2, 3), np.float32), -np.zeros((2, 3), np.float32)).status == "equal values"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_equal_values_that_are_not_finite_do_not_hide_or_make_a_difference(
    value: float, dtype: np.dtype | type
) -> None:
    a = numbers(dtype)
    a[1, 1] = value
    assert compare_values(a, a.copy()).status == "identical"
    assert compare_values(a, a.copy()).not_finite == (1, 1)
    b = a.copy()
    b[0, 0] += 1
    found = compare_values(a, b)
    assert found.status == "different"
    assert math.isfinite(found.relative_l2) and found.relative_l2 > 0.01


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_on_one_side_is_infinitely_far(value: float) -> None:
    a, b = numbers(), numbers()
    b[1, 1] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for found in (compare_values(a, b), compare_values(b, a)):
            assert (found.status, found.different) == ("different", 1)
            assert found.relative_l2 == found.largest == math.inf


def test_nan_with_other_bits_is_different() -> None:
    a, b = numbers(), numbers()
    a[0, 0] = b[0, 0] = np.nan
    b.view(np.uint32)[0, 0] ^= 1
    assert compare_values(a, b).status == "different"
    assert compare_values(a, b).largest == math.inf


def test_overflow_and_a_side_of_zeros_are_not_agreement() -> None:
    huge = np.full((1, 2), 1e300)
    assert compare_values(huge, -huge).relative_l2 == math.inf
    assert compare_values(np.zeros((1, 2)), np.ones((1, 2))).relative_l2 == math.inf
    assert compare_values(np.full((1, 2), 1e30, np.float32), np.ones((1, 2), np.float16)).status == "different"

"""What was done to an array is said if it is certain, and nothing is said otherwise."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from gpt2_jax.parity.pairs.explain import explain, explain_update, same_as_another, where_differs

RNG = np.random.default_rng(0)
SQUARE, KERNEL = RNG.normal(size=(12, 12)), RNG.normal(size=(3, 3, 3, 3))


@pytest.mark.parametrize(
    ("left", "right", "text"),
    [
        (SQUARE, SQUARE.T, "copied without its transpose"),
        (KERNEL, KERNEL.transpose(2, 3, 1, 0), "equal after a transpose by (3, 2, 0, 1)"),
        (np.ones((2, 3)), np.ones((3, 2)), "copied without its transpose"),
        (KERNEL, KERNEL[:, :, ::-1, ::-1], "reversed along axes 2, 3"),
        (SQUARE, SQUARE[::-1], "reversed along axis 0"),
        (SQUARE, SQUARE[:, ::-1], "reversed along axis 1"),
        (SQUARE, SQUARE[[*range(8, 12), *range(4), *range(4, 8)]], "blocks of 4 along axis 0 in the order 2, 0, 1"),
        (
            SQUARE,
            SQUARE.reshape(12, 2, 6).swapaxes(1, 2).reshape(12, 12),
            "axis 1 interleaved: every 6th element is adjacent",
        ),
        (SQUARE, 3 * SQUARE, "the right side is 3 times the left side"),
        (SQUARE, -SQUARE, "the right side is -1 times the left side"),
        (SQUARE, SQUARE + 1, "the right side is +1 away from the left side, everywhere"),
        (SQUARE, np.zeros((12, 12)), "the right side is 0 everywhere"),
        (np.zeros(4), np.arange(4.0), "the left side is 0 everywhere"),
        (np.ones(4), np.zeros(4), "1 on the left side and 0 on the right side, everywhere"),
        (SQUARE, SQUARE.astype(ml_dtypes.bfloat16), "the right side is rounded to bfloat16"),
        (SQUARE, SQUARE.astype(np.float32), "the right side is rounded to float32"),
        (SQUARE.astype(np.float16), SQUARE, "the left side is rounded to float16"),
    ],
)
def test_simple_operations_are_named(left: np.ndarray, right: np.ndarray, text: str) -> None:
    assert explain(left, right) == text


def test_blocks_have_the_names_of_gates() -> None:
    i, f, g, o = np.split(SQUARE, 4)
    assert explain(SQUARE, np.concatenate([i, g, f, o]), "ifgo").endswith(
        "blocks of 3 along axis 0 in the order i, g, f, o"
    )


@pytest.mark.parametrize("seed", range(50))
def test_nothing_is_said_of_other_arrays(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(2, 6, rng.integers(1, 5)))
    a = rng.normal(size=shape)
    changed = a.copy()
    changed.flat[rng.integers(a.size)] += 0.1
    for other in (rng.normal(size=shape), changed, a + 0.1 * rng.normal(size=shape)):
        if a.size > 4:
            assert explain(a, other) == ""
    assert explain(a, np.full(shape, np.nan)) == ""


def test_the_update_of_a_running_average() -> None:
    before, x = RNG.normal(size=(2, 8)) ** 2
    left = 0.9 * before + 0.1 * x
    assert explain_update(before, left, 0.1 * before + 0.9 * x) == (
        "the right side moves 9 times as far as the left side: another momentum"
    )
    assert explain_update(before, left, 0.9 * before + 0.1 * x * 11 / 12) == (
        "the left side averages the unbiased variance of 12 values, the right side the biased one"
    )
    assert explain_update(before, left, 0.9 * before + 0.1 * RNG.normal(size=8)) == ""


def test_another_array_with_the_same_values() -> None:
    others = {"a": SQUARE + 1e-9, "b": SQUARE, "c": np.zeros((12, 12))}
    assert same_as_another(SQUARE.copy(), others) == "b"
    assert same_as_another(SQUARE + 1e-9, others, 1e-8) == "a"
    assert same_as_another(np.zeros((12, 12)), others) == ""  # zeros have no identity
    assert same_as_another(np.zeros(3), others) == ""


def test_where_arrays_differ() -> None:
    a = np.zeros((2, 4, 3))
    b = a.copy()
    b[:, 1:3] = 1
    assert where_differs(a, b, 0.5) == "[0, 1, 0]: 0 and 1; 12 of 24 elements, with axis 1 from 1 to 2"
    assert where_differs(a, a, 0.5) == ""
    assert where_differs(np.array(1.0), np.array(2.0), 0.5) == "1 and 2"
    b[1, 3, 2] = np.nan
    assert where_differs(a, b, 0.5).startswith("[1, 3, 2]: 0 and nan; 13 of 24 elements")
    assert where_differs(np.array([1.0]), np.array([1 + 1e-9]), 0).startswith("[0]: 1, off by 1e-09")

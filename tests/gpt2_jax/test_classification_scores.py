"""Accuracy and F1, on tables computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from gpt2_jax import score_classification

# true 0: predicted 0, 0, 1.  true 1: predicted 1, 2.  true 2: predicted 2.  Label 3 is predicted once, for a true 0.
PREDICTED, EXPECTED = [0, 0, 1, 1, 2, 2, 3], [0, 0, 0, 1, 1, 2, 0]


def test_the_scores_of_a_table() -> None:
    """F1 of 0: TP 2, FP 0, FN 2. Of 1: TP 1, FP 1, FN 1. Of 2: TP 1, FP 1, FN 0. Of 3: TP 0."""
    scores = score_classification(PREDICTED, EXPECTED)
    assert scores.labels == (0, 1, 2, 3)
    assert scores.f1 == pytest.approx((4 / 6, 2 / 4, 2 / 3, 0))
    assert scores.macro_f1 == pytest.approx((4 / 6 + 2 / 4 + 2 / 3) / 4)
    assert scores.accuracy == pytest.approx(4 / 7)


def test_labels_that_do_not_occur_do_not_count() -> None:
    scores = score_classification([5, 5], [5, 7])
    assert scores.labels == (5, 7)
    assert (scores.accuracy, scores.macro_f1) == (0.5, pytest.approx(1 / 3))


def test_scikit_learn_gives_the_same() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    scores = score_classification(PREDICTED, EXPECTED)
    assert scores.accuracy == pytest.approx(metrics.accuracy_score(EXPECTED, PREDICTED))
    assert scores.macro_f1 == pytest.approx(metrics.f1_score(EXPECTED, PREDICTED, average="macro"))


@pytest.mark.parametrize(
    ("predicted", "expected"), [([0, 1], [0]), ([], []), ([[0, 1]], [[0, 1]]), ([0.2, 0.8], [0, 1])]
)
def test_what_is_not_a_list_of_labels_is_refused(predicted: Any, expected: Any) -> None:
    with pytest.raises(ValueError, match="labels must be"):
        score_classification(predicted, expected)

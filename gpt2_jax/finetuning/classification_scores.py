"""Accuracy and F1 of a classifier on a validation set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class ClassificationScores:
    """Scores of predictions, as scikit-learn defines them."""

    accuracy: float
    """The fraction of predictions that are correct."""
    macro_f1: float
    """The mean of `f1`, in which every label has the same weight."""
    labels: tuple[int, ...]
    """The labels that occur among the predicted or the true labels."""
    f1: tuple[float, ...]
    """For each of `labels`: 2 TP / (2 TP + FP + FN), the harmonic mean of precision and recall."""


def score_classification(predicted: ArrayLike, expected: ArrayLike) -> ClassificationScores:
    """Compare predicted with true labels.

    Equal to `accuracy_score` and `f1_score(average="macro")` of scikit-learn.

    >>> score_classification([0, 1, 1, 0], [0, 1, 0, 0]).accuracy
    0.75

    Args:
        predicted, expected: label indices, counted from 0, `[N]`. For logits, pass `logits.argmax(-1)`.

    Raises `ValueError` if the arrays are empty, differ in shape, or are not integers.
    """
    found, true = np.asarray(predicted), np.asarray(expected)
    if found.shape != true.shape or found.ndim != 1 or not found.size:
        raise ValueError(f"labels must be two non-empty lists of equal length, not {found.shape} and {true.shape}")
    if found.dtype.kind not in "iu" or true.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers, not {found.dtype} and {true.dtype}; pass logits.argmax(-1)")
    labels = np.union1d(found, true)
    hits = np.array([((found == label) & (true == label)).sum() for label in labels])
    counts = np.array([(found == label).sum() + (true == label).sum() for label in labels])
    f1 = 2 * hits / counts  # each label occurs, so no count is 0
    return ClassificationScores(
        float((found == true).mean()), float(f1.mean()), tuple(labels.tolist()), tuple(f1.tolist())
    )

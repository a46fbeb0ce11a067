"""Random pairs of correct implementations agree, with errors that are not far below their tolerances."""

from __future__ import annotations

import pytest
from parity.pairs.random_pairs import failures, random_report, ratios

QUANTITIES = {"fp64 outputs", "fp32 outputs", "fp64 gradients", "fp32 gradients"}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("seed", range(1_000_000, 1_000_020))
def test_a_correct_pair_agrees(seed: int) -> None:
    _, report = random_report(seed)
    assert report.passed, failures(report)
    assert {*ratios(report)} >= QUANTITIES

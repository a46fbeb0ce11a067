"""Random pairs of correct implementations agree, with errors that are not far below their tolerances."""

from __future__ import annotations

import pytest
from parity.pairs.random_pairs import failures, random_report, ratios
from support.samples import mostly_marked

QUANTITIES = {"fp64 outputs", "fp32 outputs", "fp64 gradients", "fp32 gradients"}


@pytest.mark.parametrize("seed", mostly_marked(range(1_000_000, 1_000_020), every=3))
def test_a_correct_pair_agrees(seed: int) -> None:
    _, report = random_report(seed)
    assert report.passed, failures(report)
    assert {*ratios(report)} >= QUANTITIES

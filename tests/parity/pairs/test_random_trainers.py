"""Random correct pairs of trainers pass, and random mistakes are not named wrongly."""

from __future__ import annotations

import pytest
from parity.pairs.random_trainers import compare_mistake, compare_random


@pytest.mark.sampled(4)
@pytest.mark.parametrize("seed", range(1_000_000, 1_000_020))
def test_a_correct_pair_passes(seed: int) -> None:
    recipe, result = compare_random(seed)
    assert result.passed, (result.departure, result.diagnosis, result.problem, recipe)


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(1_000_000, 1_000_010))
def test_no_random_mistake_is_named_wrongly(seed: int) -> None:
    kind, _, change, result = compare_mistake(seed)
    found = "not detected" if result.diagnosis is None else result.diagnosis.kind
    assert result.problem is None
    assert found in (kind, "unknown", "not detected"), (change, result.diagnosis)

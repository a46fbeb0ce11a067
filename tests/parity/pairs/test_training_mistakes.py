"""`compare_training` names the kind and the place of mistakes in training, and no kind for what it does not know."""

from __future__ import annotations

import pytest
from parity.pairs.training_mistakes import MISTAKES, UNKNOWN, Mistake, compare


@pytest.mark.sampled(6)
@pytest.mark.parametrize("mistake", [*MISTAKES, *UNKNOWN], ids=lambda mistake: mistake.name)
def test_the_mistake_is_named_with_its_place(mistake: Mistake) -> None:
    result = compare(mistake)
    assert not result.passed
    assert result.departure is not None and result.diagnosis is not None, result.problem
    assert (result.departure.step, result.departure.quantity) == (mistake.step, mistake.quantity), result.departure
    assert result.diagnosis.kind == mistake.kind, result.diagnosis
    assert result.diagnosis.evidence
    if mistake.place:
        assert result.departure.name == mistake.place
    if mistake.names:
        assert result.diagnosis.names == mistake.names
    if mistake.values is not None:
        assert result.diagnosis.values is not None
        for value, expected in zip(result.diagnosis.values, mistake.values, strict=True):
            assert value == (None if expected is None else pytest.approx(expected, rel=1e-6))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("mistake", MISTAKES[::4], ids=lambda mistake: mistake.name)
def test_no_kind_is_wrong_in_float32(mistake: Mistake) -> None:
    result = compare(mistake, "float32")
    assert result.diagnosis is None or result.diagnosis.kind in (mistake.kind, "unknown"), result.diagnosis

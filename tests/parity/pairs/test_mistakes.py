"""A report names the place of each mistake in a port of another model, and nothing without a mistake."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from parity.pairs import lstm, mistakes
from parity.pairs.mistakes import MISTAKES, Mistake, Pair, named, report_of, text_of, verdict
from parity.pairs.test_compare import failures

from gpt2_jax.parity.pairs.compare import compare


@pytest.mark.sampled(6)
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: f"{mistake.model}, {mistake.name}")
def test_the_place_is_named(mistake: Mistake) -> None:
    report = report_of(mistake)
    assert named(report) == (mistake.check, mistake.place)
    assert mistake.says in text_of(report)
    assert verdict(mistake, report) == "right"


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "pair", [mistakes.gpt(), mistakes.block(), mistakes.cell()], ids=["GPT", "ResNet block", "LSTM cell"]
)
def test_nothing_is_named_without_a_mistake(pair: Callable[[], Pair]) -> None:
    left, right, inputs = pair()
    report = compare(left, right, inputs)
    assert failures(report) == {}
    assert (named(report), report.diagnostics) == (("", ""), ())


def test_a_verdict_can_be_wrong_and_unknown() -> None:
    mistake = next(m for m in MISTAKES if m.name == "forget bias 1")
    report = report_of(mistake)
    assert verdict(mistake, report) == "right"
    other = Mistake("LSTM cell", "another place", mistake.make, "outputs", "output[1]")
    assert verdict(other, report) == "wrong"
    right = compare(*mistakes.cell()()[:2], lstm.inputs_of(), checks=["outputs"])
    assert verdict(mistake, right) == "unknown"

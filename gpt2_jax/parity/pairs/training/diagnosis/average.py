"""Why the averaged parameters of two trainers differ although the parameters are equal."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gpt2_jax.parity.pairs.training.diagnosis.evidence import Diagnosis, Evidence, unknown
from gpt2_jax.parity.pairs.training.diagnosis.fits import Estimate, linear_fit
from gpt2_jax.parity.pairs.training.transitions import AVERAGE, History, Transition, wide

SOURCES = {"after": "after the step", "before": "before the step"}


def diagnose_average(evidence: Evidence) -> Diagnosis:
    """Compare, side by side, the parameters that enter the average and their weights at every step."""
    left, right = (_identify(side, evidence.unit) for side in evidence.sides)
    if left is None or right is None:
        names = [side.name for side, f in zip(evidence.sides, (left, right), strict=True) if f is None]
        return unknown(f"The average of {evidence.name} differs, and that of {' and '.join(names)} is not exponential.")
    (source, weights), (other, others) = left, right
    if source != other:
        sentence = (
            f"{evidence.left.name} averages the parameters {SOURCES[source]}, and {evidence.right.name} those "
            f"{SOURCES[other]}."
        )
        return Diagnosis("average", (sentence,))
    values = _decay(weights[evidence.step - 1]), _decay(others[evidence.step - 1])
    shown = [", ".join(f"{_decay(w):.6g}" for w in each[:5]) for each in (weights, others)]
    fact = f"The decay of the average is {shown[0]} at steps 1, 2, ... on {evidence.left.name} and {shown[1]} on "
    sentences = [fact + f"{evidence.right.name}."]
    for k, each in enumerate((weights, others)):
        if (decay := _bias_corrected(each)) is not None and _bias_corrected((weights, others)[1 - k]) is None:
            sentences.append(f"That of {evidence.sides[k].name} is {decay:.6g} with bias correction.")
    if not any(a.differs(b) for a, b in zip(weights, others, strict=True)):
        return unknown(f"The average of {evidence.name} differs, and its decay does not.")
    return Diagnosis("average", tuple(sentences), values=values)


def _decay(weight: Estimate) -> float:
    return 1 - weight.value if weight.differs(1.0) else 0.0


def _identify(side: History, unit: float) -> tuple[str, list[Estimate]] | None:
    """The source and the weight of the new parameters, ema' = ema + w (p - ema), that explain all steps."""
    for source in SOURCES:
        fits = [_weight(t, source, unit) for t in side.transitions]
        if all(fit is not None for fit in fits):
            return source, [fit for fit in fits if fit is not None]
    return None


def _weight(t: Transition, source: str, unit: float) -> Estimate | None:
    names = [*t.before]
    new: Mapping[str, np.ndarray] = {n: wide((t.after if source == "after" else t.before)[n]) for n in names}
    old = {n: t.moment(AVERAGE, n, before=True) for n in names}
    change = {n: t.moment(AVERAGE, n) - old[n] for n in names}
    towards = {n: new[n] - old[n] for n in names}
    noise = {n: 4 * unit * (np.abs(old[n]) + np.abs(new[n])) for n in names}
    if not any(x.any() for x in towards.values()):
        is_still = all((np.abs(change[n]) <= noise[n]).all() for n in names)
        return Estimate(0.0, 1.0) if is_still else None  # any weight explains this step
    fit = linear_fit(change, [towards], noise)
    return fit.coefficients[0] if fit is not None and fit.accepted else None


def _bias_corrected(weights: list[Estimate]) -> float | None:
    """The decay d, if the weights are (1 - d) / (1 - d^t)."""
    if len(weights) < 3 or weights[0].differs(1.0) or weights[1].value <= 0:
        return None
    decay = 1 / weights[1].value - 1  # (1 - d) / (1 - d^2) = 1 / (1 + d)
    expected = [(1 - decay) / (1 - decay**t) for t in range(1, len(weights) + 1)] if 0 < decay < 1 else []
    matches = expected and all(abs(w.value - e) <= 8 * w.error + 1e-6 for w, e in zip(weights, expected, strict=True))
    return decay if matches else None

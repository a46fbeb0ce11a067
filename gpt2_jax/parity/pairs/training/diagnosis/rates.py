"""Updates that differ in their learning rate: a factor, a schedule, or a missing bias correction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpt2_jax.parity.pairs.training.diagnosis.evidence import Diagnosis, Evidence, unknown
from gpt2_jax.parity.pairs.training.diagnosis.fits import Estimate, UpdateFit, fit_update
from gpt2_jax.parity.pairs.training.transitions import SQUARE

MIN_STEPS = 3
"""At one step, a missing bias correction and Nesterov's form look like another learning rate."""


@dataclass(frozen=True)
class Identified:
    """The form of one side's updates, and its coefficients at every step."""

    form: str
    fits: tuple[UpdateFit, ...]

    @property
    def rates(self) -> list[Estimate]:
        return [fit.rate for fit in self.fits]


def step_count(evidence: Evidence, k: int) -> float:
    """The optimizer's step count after step k + 1."""
    for side in evidence.sides:
        for count in side.transitions[k].state.get("count", {}).values():
            return float(np.asarray(count).flat[0])
    return float(k + 1)


def learning_rate(evidence: Evidence, rate: float, k: int) -> tuple[float, bool]:
    """The learning rate behind a fitted rate, and whether its bias correction is known."""
    if SQUARE not in evidence.at[0].state:
        return rate, True
    betas = next((b for b in evidence.betas if b is not None), None)
    if betas is None:
        return rate, False
    t = step_count(evidence, k)
    return rate * (1 - betas[0] ** t) / (1 - betas[1] ** t) ** 0.5, True


def ratios(left: Identified, right: Identified) -> list[float]:
    """The rate of the right side relative to the left one at every step: infinite where the left one is zero, NaN where
    both are."""
    pairs = zip(left.rates, right.rates, strict=False)
    return [b.value / a.value if a.value else (np.inf if b.value else np.nan) for a, b in pairs]


def factor_errors(left: Identified, right: Identified) -> list[float]:
    """The relative errors of `ratios`."""
    pairs = zip(left.rates, right.rates, strict=False)
    return [1e-9 + 8 * sum(x.error / abs(x.value) for x in pair if x.value) for pair in pairs]


def listed_factors(factors: Sequence[float]) -> str:
    return ", ".join("any" if np.isnan(factor) else f"{factor:.8g}" for factor in factors[:6])


def diagnose_rates(evidence: Evidence, left: Identified, right: Identified, epsilon: bool) -> Diagnosis:
    """Learning rates differ: a constant factor, a missing bias correction, or another schedule."""
    factors, errors = ratios(left, right), factor_errors(left, right)
    fact = f"The updates of {evidence.right.name} are those of {evidence.left.name} times {listed_factors(factors)} at "
    fact += f"steps 1 to {len(factors)}, as fitted on each side alone."
    if len(factors) < MIN_STEPS:
        return unknown(
            fact, f"With fewer than {MIN_STEPS} steps, this may be the learning rate or the bias correction."
        )
    if (found := bias_correction(evidence, factors, errors)) is not None:
        return found
    if epsilon:
        return unknown(fact, "Epsilon differs too.")
    rates = [
        [learning_rate(evidence, fit.rate.value, k)[0] for k, fit in enumerate(side.fits)] for side in (left, right)
    ]
    values = (rates[0][evidence.step - 1], rates[1][evidence.step - 1])
    known = [(f, e) for f, e in zip(factors, errors, strict=True) if not np.isnan(f)]
    is_constant = all(0 < f < np.inf and abs(f / known[0][0] - 1) <= e + known[0][1] for f, e in known)
    if is_constant and len(known) > 1:
        shown = " and ".join(f"{v:.6g} on {side.name}" for v, side in zip(values, evidence.sides, strict=True))
        return Diagnosis(
            "learning rate", (fact, f"The factor is constant. The learning rate is {shown}."), values=values
        )
    shift = _shift(rates, errors)
    if shift is None and not _is_schedule(evidence):
        return unknown(fact, "With the same state, the factor depends on the batch, or a side cannot repeat a step.")
    sentences = [fact, *(_listed_rates(side.name, r) for side, r in zip(evidence.sides, rates, strict=True))]
    if shift is not None:
        later = evidence.sides[1 if shift < 0 else 0].name
        steps = "1 step" if abs(shift) == 1 else f"{abs(shift)} steps"
        sentences.append(f"The schedule of {later} is the other's, {steps} later.")
    return Diagnosis("learning rate schedule", tuple(sentences), values=values)


def _is_schedule(evidence: Evidence) -> bool:
    """Whether the rate of the step is the same for all batches. Where updates are clipped, it is not."""
    for transitions in evidence.replayed:
        fits = [fit_update(t, evidence.unit, "plain") for t in transitions or ()]
        rates = [fit.rate for fit in fits if fit is not None and fit.accepted]
        if len(rates) < 2 or len(rates) < len(fits) or any(rate.differs(rates[0]) for rate in rates):
            return False
    return True


def _listed_rates(name: str, rates: Sequence[float]) -> str:
    return f"Learning rates of {name}: {', '.join(f'{rate:.6g}' for rate in rates[:8])}."


def _shift(rates: Sequence[Sequence[float]], errors: Sequence[float]) -> int | None:
    """k with right[t] = left[t + k], if it holds for all steps that both have and the rates are not constant."""
    left, right = (np.asarray(side) for side in rates)
    for k in sorted(range(-len(left) + 2, len(left) - 1), key=abs):
        a, b = (left[k:], right[: len(right) - k]) if k > 0 else (left[: len(left) + k], right[-k:])
        if k and len(a) >= 2 and np.ptp(a) > 1e-6 * abs(a).max() and np.allclose(a, b, rtol=2 * max(errors), atol=0):
            return k
    return None


def bias_correction(evidence: Evidence, factors: Sequence[float], errors: Sequence[float]) -> Diagnosis | None:
    """Whether all factors are those of a bias correction that one side lacks or does for another step."""
    betas = next((b for b in evidence.betas if b is not None), None)
    if SQUARE not in evidence.at[0].state or betas is None or np.isfinite(factors).sum() < MIN_STEPS - 1:
        return None
    counts = np.array([step_count(evidence, k) for k in range(len(factors))])

    def first(counts: np.ndarray) -> np.ndarray:
        return np.asarray(1 - betas[0] ** counts)

    def second(counts: np.ndarray) -> np.ndarray:
        return np.asarray((1 - betas[1] ** counts) ** 0.5)

    wrong = {
        "does not correct the bias of the moments": first(counts) / second(counts),
        "does not correct the bias of the first moment": first(counts),
        "does not correct the bias of the second moment": 1 / second(counts),
    }
    for k in (1, 2):
        later = first(counts) / second(counts) * second(counts + k) / first(counts + k)
        wrong[f"corrects the bias of the moments for {k} steps later"] = later
    for what, expected in wrong.items():
        for k, predicted in ((1, expected), (0, 1 / expected)):
            if np.nanmax(np.abs(np.asarray(factors) / predicted - 1) - np.asarray(errors)) <= 1e-7:
                fact = f"{evidence.sides[k].name} {what}: the part of the moments in the update differs by the factors "
                fact += f"{listed_factors(factors)}, and b1 {betas[0]:.6g} and b2 {betas[1]:.6g} predict "
                return Diagnosis("bias correction", (fact + f"{listed_factors([*predicted])}.",))
    return None

"""Why the updates of two trainers differ although their gradients and moments are equal."""

from __future__ import annotations

import numpy as np

from gpt2_jax.parity.pairs.training.diagnosis.evidence import Diagnosis, Evidence, listed, norm, unknown
from gpt2_jax.parity.pairs.training.diagnosis.fits import FORMS, Estimate, UpdateFit, fit_update, linear_fit
from gpt2_jax.parity.pairs.training.diagnosis.rates import (
    Identified,
    bias_correction,
    diagnose_rates,
    factor_errors,
    learning_rate,
    listed_factors,
    ratios,
    step_count,
)
from gpt2_jax.parity.pairs.training.transitions import MOMENT, MOMENTUM, SQUARE, History


def identify(side: History, unit: float) -> Identified | None:
    """Find the form that explains all updates of a side. Steps that do not move the parameters are left out."""
    for form in FORMS:
        fits = [fit_update(t, unit, form) for t in side.transitions]
        if form == "nesterov":  # the first step has no moment before it, so it does not determine this form
            fits = [fit for fit in fits if fit is not None]
        if fits and all(fit is not None and fit.accepted for fit in fits):
            found = Identified(form, tuple(fit for fit in fits if fit is not None))
            if form != "nesterov" or any(fit.second.differs(0.0) for fit in found.fits):
                return found
    return None


def diagnose_update(evidence: Evidence) -> Diagnosis:
    """Explain a difference of updates."""
    kinds = [{MOMENT, SQUARE, MOMENTUM} & t.state.keys() for t in evidence.at]
    if kinds[0] != kinds[1]:  # the same coefficient then means something else on each side
        shown = " and ".join(
            f"{', '.join(sorted(k)) or 'none'} on {s.name}" for k, s in zip(kinds, evidence.sides, strict=True)
        )
        return unknown(f"The optimizers keep different states: {shown}.")
    left, right = (identify(side, evidence.unit) for side in evidence.sides)
    if left is None or right is None:
        if not any(kind in t.state for t in evidence.at for kind in (MOMENT, MOMENTUM)):
            return _without_state(evidence)
        names = [side.name for side, found in zip(evidence.sides, (left, right), strict=True) if found is None]
        return unknown(
            f"The update of {evidence.name} differs, and the moments are equal. The updates of "
            f"{' and '.join(names)} are not those of Adam, AdamW, AMSGrad, NAdam or SGD with one learning rate."
        )
    if left.form != right.form:
        return _other_form(evidence, left, right)
    if left.form == "nesterov":
        return unknown(f"The update of {evidence.name} differs, and both sides use Nesterov's form.")
    return _other_coefficients(evidence, left, right)


def _other_form(evidence: Evidence, left: Identified, right: Identified) -> Diagnosis:
    kinds = {"inside": "epsilon", "amsgrad": "amsgrad", "nesterov": "nesterov"}
    words = {
        "plain": "m / (sqrt(v) + eps)" if SQUARE in evidence.at[0].state else "the momentum",
        "inside": "m / sqrt(v + eps)",
        "amsgrad": "the largest v so far (AMSGrad)",
        "nesterov": "Nesterov's look-ahead",
    }
    special = [found.form for found in (left, right) if found.form != "plain"]
    if len(special) != 1:
        return unknown(f"{evidence.left.name} uses {words[left.form]}, {evidence.right.name} {words[right.form]}.")
    sentence = (
        f"{evidence.left.name} updates by {words[left.form]} and {evidence.right.name} by {words[right.form]}: each "
    )
    sentence += f"form explains all elements of its side's {len(left.fits)} steps to within rounding."
    sentences, values = [sentence], None
    if special[0] == "inside":
        values = _epsilons(evidence, left), _epsilons(evidence, right)
        shown = ["unknown" if v is None else f"{v:.4g}" for v in values]
        sentences.append(f"Epsilon is {shown[0]} on {evidence.left.name} and {shown[1]} on {evidence.right.name}.")
    return Diagnosis(kinds[special[0]], tuple(sentences), values=values)  # type: ignore[arg-type]


def _epsilons(evidence: Evidence, found: Identified) -> float | None:
    """Epsilon of a side, if bias correction is known."""
    fit = found.fits[0]
    betas = next((b for b in evidence.betas if b is not None), None)
    if betas is None:
        return None
    correction = 1 - betas[1] ** step_count(evidence, 0)
    return fit.epsilon.value / (correction if found.form == "inside" else correction**0.5)


def _other_coefficients(evidence: Evidence, left: Identified, right: Identified) -> Diagnosis:
    """Compare the fitted learning rates, epsilons and weight decays of all steps."""
    at = evidence.step - 1
    pairs = list(zip(left.fits, right.fits, strict=False))
    same_rate = all(not a.rate.differs(b.rate) for a, b in pairs)
    epsilon = [k for k, (a, b) in enumerate(pairs) if a.epsilon.differs(b.epsilon)]
    decays = _different_decays(pairs[at][0], pairs[at][1], coupled=not same_rate)
    if decays and not same_rate and not _different_decays(*pairs[at], coupled=False):
        # The decay is the same, so only the part of the moments has another factor.
        factors = ratios(left, right)
        return bias_correction(evidence, factors, factor_errors(left, right)) or unknown(
            f"The part of the moments in the update differs by the factors {listed_factors(factors)}, and weight decay "
            "does not."
        )
    if same_rate and decays and not epsilon:
        return _weight_decay(evidence, pairs[at], decays)
    if same_rate and epsilon and not decays:
        values = _epsilons(evidence, left), _epsilons(evidence, right)
        shown = [f"{v:.4g}" if v is not None else "unknown" for v in values]
        sentence = (
            f"The learning rates are equal, and m / (sqrt(v) + eps) explains all elements with the epsilon {shown[0]} "
        )
        sentence += f"on {evidence.left.name} and {shown[1]} on {evidence.right.name}."
        return Diagnosis("epsilon", (sentence,), values=values)
    if not same_rate and not decays:
        return diagnose_rates(evidence, left, right, bool(epsilon))
    return unknown(
        f"The update of {evidence.name} differs in several coefficients: {_coefficients(evidence, pairs[at])}"
    )


def _coefficients(evidence: Evidence, pair: tuple[UpdateFit, UpdateFit]) -> str:
    return "; ".join(
        f"{side.name} rate {fit.rate.value:.6g}, epsilon {fit.epsilon.value:.3g}"
        for side, fit in zip(evidence.sides, pair, strict=True)
    )


def _different_decays(left: UpdateFit, right: UpdateFit, coupled: bool) -> dict[str, tuple[float, float]]:
    """Parameters whose weight decay differs, relative to the learning rate if `coupled`."""
    if 0.0 in (left.rate.value, right.rate.value):
        return {}
    factor = right.rate.value / left.rate.value if coupled else 1.0
    found = {}
    for name in left.decay.keys() & right.decay.keys():
        a, b = left.decay[name].times(factor), right.decay[name]
        relative = (
            (left.rate.error / abs(left.rate.value) + right.rate.error / abs(right.rate.value)) if coupled else 0.0
        )
        if Estimate(a.value, a.error + abs(a.value) * relative).differs(b):
            found[name] = left.decay[name].value, b.value
    return {name: found[name] for name in left.decay if name in found}


def _weight_decay(
    evidence: Evidence, pair: tuple[UpdateFit, UpdateFit], decays: dict[str, tuple[float, float]]
) -> Diagnosis:
    rate, exact = learning_rate(evidence, pair[0].rate.value, evidence.step - 1)
    values = [float(np.median([both[k] for both in decays.values()])) / rate for k in (0, 1)]
    values = [value if abs(value) > 1e-9 * max(map(abs, values)) else 0.0 for value in values]  # rounding of zero
    names = [*decays]
    per = "" if exact else " times the learning rate's unknown bias correction"
    sentence = (
        "Beside Adam's or SGD's part, the update is minus the learning rate times the parameter times "
        f"{values[0]:.4g} on {evidence.left.name}, and {values[1]:.4g} on {evidence.right.name}{per}."
    )
    others = [
        name
        for name, estimate in pair[0].decay.items()
        if name not in decays and (estimate.differs(0.0) or pair[1].decay[name].differs(0.0))
    ]
    which = f"It differs for {len(names)} of {len(evidence.at[0].before)} parameters: {listed(names)}."
    if others:
        which += f" {listed(others)} decay alike on both sides."
    return Diagnosis("weight decay", (sentence, which), tuple(names), (values[0], values[1]) if exact else None)


def _without_state(evidence: Evidence) -> Diagnosis:
    """Plain SGD and unknown optimizers: compare the updates themselves."""
    names = [*evidence.at[0].before]
    a, b = ({n: t.update(n) for n in names} for t in evidence.at)
    bound = evidence.bounds.relative * max(float(np.abs(x).max(initial=0.0)) for side in (a, b) for x in side.values())
    before = {n: evidence.at[0].before[n].astype(np.float64) for n in names}
    noise = {n: bound + 4 * evidence.unit * np.abs(before[n]) for n in names}
    fit = linear_fit(b, [a], noise, before)
    if fit is None or not fit.accepted:
        return unknown("The updates differ, not by a constant factor and not in proportion to the parameter.")
    ratio = fit.coefficients[0]
    decays = [
        name
        for name, estimate in fit.decay.items()
        if estimate.differs(0.0) and abs(estimate.value) * np.abs(before[name]).max() > 2 * bound
    ]
    if not ratio.differs(1.0) and decays:
        value = float(np.median([fit.decay[name].value for name in decays]))
        sentence = f"The update of {evidence.right.name} is the other's minus {-value:.6g} times the parameter, in "
        return Diagnosis("weight decay", (sentence + f"{listed(decays)}.",), tuple(decays))
    fact = (
        f"The update of {evidence.right.name} is {ratio.value:.8g} times that of {evidence.left.name}, in all elements."
    )
    if decays or not ratio.differs(1.0):
        return unknown(f"The updates differ in their scale, and by a multiple of {listed(decays)}.")
    return _scaled_update(evidence, fact)


def _scaled_update(evidence: Evidence, fact: str) -> Diagnosis:
    left, right = evidence.replays
    if left is None or right is None:
        return unknown(fact)
    norms = np.array([[_update_norm(evidence, k, step) for step in steps] for k, steps in enumerate((left, right))])
    for k in (0, 1):
        top = norms[k].max()
        reached = norms[k] >= top * (1 - 1e-5)
        if reached.sum() >= 2 and np.allclose(np.minimum(norms[1 - k], top), norms[k], rtol=1e-5):
            sentence = (
                f"On all batches, the update of {evidence.sides[k].name} has at most the norm {top:.6g}, and up to it "
            )
            return Diagnosis("gradient clipping", (fact, sentence + "equals the other's: it clips gradients."))
    return unknown(
        fact, "Without a state or gradients on both sides, the learning rate, its schedule or the gradient differs."
    )


def _update_norm(evidence: Evidence, k: int, step: object) -> float:
    side = evidence.sides[k]
    after = side.arrays(step.parameters)  # type: ignore[attr-defined]
    before = evidence.at[k].before
    return norm({n: after[n].astype(np.float64) - before[n].astype(np.float64) for n in after})

"""Why the gradients or moments of two trainers differ although parameters and losses are equal."""

from __future__ import annotations

import numpy as np

from gpt2_jax.parity.pairs.training.diagnosis.changes import Change, fit_change, is_masked, or_zeros
from gpt2_jax.parity.pairs.training.diagnosis.evidence import Diagnosis, Evidence, listed, unknown
from gpt2_jax.parity.pairs.training.diagnosis.fits import Estimate, linear_fit
from gpt2_jax.parity.pairs.training.diagnosis.scaling import diagnose_scaling
from gpt2_jax.parity.pairs.training.rounding import STATES
from gpt2_jax.parity.pairs.training.transitions import SQUARE


def diagnose_gradient(evidence: Evidence) -> Diagnosis:
    """Explain a difference of gradients, first moments or momentum."""
    change = fit_change(evidence, *evidence.at)
    if change is None:
        return _by_value(evidence) or unknown(
            f"The {evidence.quantity} of {evidence.name} differs, not by a constant factor, and not in proportion to "
            "the parameter or to the moment before the step."
        )
    has_past, has_scale = change.past.differs(0.0), change.scale.differs(0.0)
    if change.decay and not has_past and not has_scale:
        return _coupled_decay(evidence, change)
    if change.decay:
        return unknown(f"The {evidence.quantity} differs in its scale, and by a multiple of {listed([*change.decay])}.")
    if has_past and not has_scale:
        return _decay_rate(evidence, change)
    if has_past or not has_scale:
        return unknown(f"The {evidence.quantity} differs by several multiples of the moment and of the gradient.")
    factor = 1 + change.scale.value
    fact = (
        f"The {evidence.quantity} of {evidence.right.name} is {factor:.8g} times that of {evidence.left.name} at step "
    )
    fact += f"{evidence.step}, in all elements."
    if evidence.quantity == "first moment" and (other := _if_not_the_gradient(evidence, factor, fact)) is not None:
        return other
    return diagnose_scaling(evidence, factor, fact)


def _coupled_decay(evidence: Evidence, change: Change) -> Diagnosis:
    names = tuple(change.decay)
    values = [estimate.value for estimate in change.decay.values()]
    known = next((b for b in evidence.betas if b is not None), None)
    scale = 1 / (1 - known[0]) if evidence.quantity == "first moment" and known is not None else 1.0
    rate = float(np.median(values)) * scale
    side = evidence.sides[1 if rate > 0 else 0].name
    sentence = (
        f"The {evidence.quantity} of {side} is the other's plus {abs(np.median(values)):.4g} times the parameter, in "
        f"{len(names)} of {len(evidence.at[0].before)} parameters: L2 decay that is added to the gradient"
        + (f", with the rate {abs(rate):.4g}." if scale != 1.0 or evidence.quantity != "first moment" else ".")
    )
    return Diagnosis("weight decay", (sentence, f"Parameters: {listed(names)}."), names)


def _decay_rate(evidence: Evidence, change: Change) -> Diagnosis:
    sentence = (
        f"The {evidence.quantity} of {evidence.right.name} is the other's plus {change.past.value:.6g} times the one "
        f"before the step: another decay rate of the {evidence.quantity}."
    )
    return Diagnosis("betas", (sentence, *_beta_values(evidence)), values=_first_betas(evidence, 0))


def _beta_values(evidence: Evidence) -> tuple[str, ...]:
    shown = [
        f"{side.name} b1 {b[0]:.6g}, b2 {b[1]:.6g}"
        for side, b in zip(evidence.sides, evidence.betas, strict=True)
        if b is not None
    ]
    return (f"Fitted: {'; '.join(shown)}.",) if shown else ()


def _first_betas(evidence: Evidence, k: int) -> tuple[float | None, float | None]:
    left, right = (None if b is None else b[k] for b in evidence.betas)
    return left, right


def _if_not_the_gradient(evidence: Evidence, factor: float, fact: str) -> Diagnosis | None:
    """The second moment shows whether the gradient or its weight 1 - b1 is scaled."""
    left, right = evidence.at
    if SQUARE not in left.state or SQUARE not in right.state:
        return unknown(fact, "Without second moments on both sides, the gradient or its weight 1 - b1 may be scaled.")
    ratio = _square_ratio(evidence)
    if ratio is None:
        return unknown(fact, "The second moments have no constant ratio.")
    if not ratio.differs(1.0) or abs(ratio.value - 1) < 1e-2 * abs(factor - 1):
        sentence = "The second moments are equal, so the gradients are, and their weight 1 - b1 differs."
        return Diagnosis("betas", (fact, sentence, *_beta_values(evidence)), values=_first_betas(evidence, 0))
    if abs(ratio.value / factor**2 - 1) > 1e-4:
        return unknown(fact, f"The second moments have the ratio {ratio.value:.6g}, not the square of that.")
    return None


def _square_ratio(evidence: Evidence) -> Estimate | None:
    """The ratio of what the step added to the second moments, right / left."""
    left, right = evidence.at
    names = [name for name in left.before if not is_masked(evidence, name)]
    v, w, v0 = (
        {n: t.moment(SQUARE, n, before) for n in names} for t, before in ((left, False), (right, False), (left, True))
    )
    largest = max(float(np.maximum(v[n], w[n]).max(initial=0.0)) for n in names)
    noise = {n: np.sqrt(np.maximum(v[n], w[n]) * largest) * 4 * evidence.bounds.relative for n in names}
    columns = [v, v0] if any(x.any() for x in v0.values()) else [v]
    fit = linear_fit(w, columns, noise)
    return fit.coefficients[0] if fit is not None and fit.accepted else None


def diagnose_second_moment(evidence: Evidence) -> Diagnosis:
    """Explain a difference of second moments alone: the decay rate b2."""
    ratio = _square_ratio(evidence)
    if ratio is None or not ratio.differs(1.0):
        return unknown(f"The second moment of {evidence.name} differs, and the first moments are equal.")
    sentence = (
        f"The second moments of {evidence.right.name} have a constant ratio to the other's ({ratio.value:.6g}) at step "
        f"{evidence.step}, and the first moments are equal: another decay rate b2."
    )
    return Diagnosis("betas", (sentence, *_beta_values(evidence)), values=_first_betas(evidence, 1))


def _by_value(evidence: Evidence) -> Diagnosis | None:
    """Each element is limited to a largest magnitude on one side."""
    left, right = evidence.at
    kind = STATES.get(evidence.quantity)
    if kind is not None and any(x.any() for x in left.state_before.get(kind, {}).values()):
        return None
    a, b = (
        np.concatenate(
            [(or_zeros(t.gradients, n, p) if kind is None else t.moment(kind, n)).ravel() for n, p in t.before.items()]
        )
        for t in (left, right)
    )
    for k, (free, clipped) in enumerate(((a, b), (b, a))):
        limit = float(np.abs(clipped).max(initial=0.0))
        bound = evidence.bounds.relative * float(np.abs(free).max(initial=0.0))
        reached = int((np.abs(clipped) >= limit * (1 - 1e-12)).sum())
        if reached >= 3 and (np.abs(np.clip(free, -limit, limit) - clipped) <= bound).all():
            side = evidence.sides[1 - k].name
            sentence = f"The {evidence.quantity} of {side} is the other's with each element limited to {limit:.6g}: "
            sentence += f"{reached} elements reach it."
            return Diagnosis("gradient clipping", (sentence,))
    return None

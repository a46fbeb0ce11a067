"""The difference of two gradients or moments, as a linear combination of its possible causes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpt2_jax.parity.pairs.training.diagnosis.evidence import Evidence
from gpt2_jax.parity.pairs.training.diagnosis.fits import Estimate, Fit, linear_fit
from gpt2_jax.parity.pairs.training.rounding import STATES
from gpt2_jax.parity.pairs.training.transitions import MOMENT, Transition, wide


@dataclass(frozen=True)
class Change:
    """right - left = past * moment before the step + scale * gradient + decay_k * parameter."""

    past: Estimate
    scale: Estimate
    decay: dict[str, Estimate]
    """Only tensors where it is significant."""


def fit_change(evidence: Evidence, left: Transition, right: Transition) -> Change | None:
    """Fit the difference of the sides after one step from the same state. None if no multiples explain it.

    If neither side's gradient is known, the left moment takes its place.
    """
    kind = STATES.get(evidence.quantity)
    names = [name for name in left.before if not is_masked(evidence, name)]
    if kind is None:
        if left.gradients is None or right.gradients is None:
            return None
        a, b = ({n: or_zeros(t.gradients, n, t.before[n]) for n in names} for t in (left, right))
        columns = [a]
    else:
        a, b = ({n: t.moment(kind, n) for n in names} for t in (left, right))
        earlier = {n: left.moment(kind, n, before=True) for n in names}
        has_past = any(x.any() for x in earlier.values())
        known = left.gradients if left.gradients is not None else right.gradients
        columns = [a if known is None else {n: or_zeros(known, n, left.before[n]) for n in names}]
        columns += [earlier] if has_past else []
    bound = evidence.bounds.relative * max(float(np.abs(x).max(initial=0.0)) for side in (a, b) for x in side.values())
    noise = {n: np.where(evidence.sound(n, a[n].shape), bound, np.inf) for n in names}
    decay = {n: left.before[n] for n in names}
    fit = linear_fit({n: b[n] - a[n] for n in names}, columns, noise, decay)
    if fit is None or not fit.accepted:
        return None
    past = fit.coefficients[1] if len(fit.coefficients) > 1 else Estimate(0.0, 0.0)
    scale = fit.coefficients[0]
    if kind is not None and columns[0] is not a:
        scale = _relative_to_moment(evidence, fit)
        if left.gradients is None:  # the column is the right gradient: right - left = (1 - 1 / c) right
            scale = Estimate(1 / (1 - scale.value) - 1, scale.error / (1 - scale.value) ** 2)
    elif kind is not None and len(columns) > 1:
        past = _beyond_scaling(fit, evidence, kind)
    return Change(past, scale, _significant(fit, decay, bound))


def _relative_to_moment(evidence: Evidence, fit: Fit) -> Estimate:
    """The factor of the gradient minus 1: the gradient enters the moment with the factor 1 - b1 in Adam, 1 in SGD."""
    if evidence.quantity != "first moment":
        return fit.coefficients[0]
    betas = next((b for b in evidence.betas if b is not None), None)
    return fit.coefficients[0] if betas is None else fit.coefficients[0].times(1 / (1 - betas[0]))


def _beyond_scaling(fit: Fit, evidence: Evidence, kind: str) -> Estimate:
    """Without the gradient, scaling it changes the moment by c (m' - b1 m). Return what remains of the term of m."""
    scale, past = fit.coefficients
    betas = next((b for b in evidence.betas if b is not None), None)
    if kind != MOMENT or betas is None or not scale.differs(0.0):
        return past
    return Estimate(past.value + betas[0] * scale.value, past.error + scale.error + 1e-6 * abs(scale.value))


def _significant(fit: Fit, parameters: dict[str, np.ndarray], bound: float) -> dict[str, Estimate]:
    return {
        name: estimate
        for name, estimate in fit.decay.items()
        if estimate.differs(0.0) and abs(estimate.value) * float(np.abs(wide(parameters[name])).max()) > 2 * bound
    }


def or_zeros(arrays: object, name: str, like: np.ndarray) -> np.ndarray:
    found = arrays.get(name) if arrays is not None else None  # type: ignore[attr-defined]
    return np.zeros(like.shape) if found is None else wide(found)


def is_masked(evidence: Evidence, name: str) -> bool:
    noise = evidence.bounds.noise.get(name)
    return noise is not None and bool(noise.all())

"""Adam's decay rates b1 and b2, identified from the moments of a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpt2_jax.parity.pairs.training.diagnosis.fits import linear_fit
from gpt2_jax.parity.pairs.training.transitions import MOMENT, SQUARE, Transition, wide


def fit_betas(transitions: Sequence[Transition], unit: float) -> tuple[float, float] | None:
    """Adam's b1 and b2, from the first step that determines them.

    With the gradient, m' = b1 m + (1 - b1) g. Without it, g is eliminated: v' is linear in v, m'^2, m' m and m^2.
    """
    for transition in transitions:
        if not {MOMENT, SQUARE} <= transition.state.keys():
            return None
        found = _betas_by_gradient(transition, unit) or _betas_by_elimination(transition, unit)
        if found is not None and all(0 <= b < 1 for b in found):
            return _snapped(found[0]), _snapped(found[1])
    return None


def _snapped(beta: float) -> float:
    """Hyperparameters are short decimals. A fitted value within rounding of one is replaced by it."""
    return round(beta, 6) if abs(beta - round(beta, 6)) < 1e-9 else beta


def _betas_by_gradient(t: Transition, unit: float) -> tuple[float, float] | None:
    if t.gradients is None:
        return None
    names = [name for name in t.before if name in t.gradients]
    g = {name: wide(t.gradients[name]) for name in names}
    found = []
    for kind, power in ((MOMENT, 1), (SQUARE, 2)):
        earlier = {name: t.moment(kind, name, before=True) for name in names}
        difference = {name: t.moment(kind, name) - g[name] ** power for name in names}
        column = {name: earlier[name] - g[name] ** power for name in names}
        noise = {name: 8 * unit * (np.abs(earlier[name]) + np.abs(g[name] ** power)) for name in names}
        fit = linear_fit(difference, [column], noise)
        if fit is None or not fit.accepted:
            return None
        found.append(fit.coefficients[0].value)
    return found[0], found[1]


def _betas_by_elimination(t: Transition, unit: float) -> tuple[float, float] | None:
    m, m0, v, v0 = (
        {name: t.moment(kind, name, before) for name in t.before}
        for kind, before in ((MOMENT, False), (MOMENT, True), (SQUARE, False), (SQUARE, True))
    )
    if not any(x.any() for x in m0.values()):
        return None
    columns = [v0, {n: m[n] ** 2 for n in m}, {n: m[n] * m0[n] for n in m}, {n: m0[n] ** 2 for n in m}]
    # g is recovered from m' - b1 m, which magnifies the rounding of m by 1 / (1 - b1): allow for b1 up to 0.99.
    noise = {n: 16 * unit * (v[n] + 100 * (np.abs(m[n]) + np.abs(m0[n])) ** 2) for n in m}
    fit = linear_fit(v, columns, noise)
    if fit is None or not fit.accepted or fit.coefficients[1].value <= 0:
        return None
    b2, square, mixed, last = (c.value for c in fit.coefficients)
    b1 = -mixed / (2 * square)
    consistent = abs(last - square * b1**2) <= 1e-3 * abs(last) and abs(square * (1 - b1) ** 2 - (1 - b2)) <= 1e-3 * (
        1 - b2
    )
    return (b1, b2) if consistent else None

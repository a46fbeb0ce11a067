"""Least-squares fits that identify what an optimizer computed, from the tensors after a step.

Each element of each tensor is one equation, and its rounding error is known. A form is accepted only if it explains
every element to within its rounding error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gpt2_jax.parity.pairs.training.transitions import MOMENT, MOMENTUM, SQUARE, Transition, wide

Tensors = Mapping[str, np.ndarray]

ACCEPTED = 4.0
"""The largest residual of an accepted form, as a multiple of the rounding error of its element."""

SIGNIFICANT = 8.0
"""Two coefficients differ if they are this many standard errors apart."""

MAX_ITERATIONS = 50

MAX_ROWS = 4096
"""Elements of one tensor that a fit uses, evenly spaced."""


@dataclass(frozen=True)
class Estimate:
    """A fitted coefficient and its standard error."""

    value: float
    error: float

    def differs(self, other: Estimate | float) -> bool:
        value, error = (other.value, other.error) if isinstance(other, Estimate) else (other, 0.0)
        # Below 1e-12 of a value, the rounding of the hyperparameters themselves is significant.
        noise = SIGNIFICANT * (self.error + error) + 1e-12 * max(abs(self.value), abs(value))
        return abs(self.value - value) > noise

    def times(self, factor: float) -> Estimate:
        return Estimate(self.value * factor, self.error * abs(factor))


@dataclass(frozen=True)
class Fit:
    """The result of a fit."""

    coefficients: tuple[Estimate, ...]
    decay: Mapping[str, Estimate]
    """Tensor -> the coefficient of its parameter."""
    residual: float
    """The largest residual, as a multiple of the rounding error of its element."""

    @property
    def accepted(self) -> bool:
        return self.residual <= ACCEPTED


def linear_fit(target: Tensors, columns: Sequence[Tensors], noise: Tensors, decay: Tensors | None = None) -> Fit | None:
    """Fit target = sum of c_j columns_j + d_k decay_k with common c and one d for each tensor k.

    Returns:
        None if there are too few equations, or if they do not determine the coefficients.
    """
    blocks, kept = [], {}
    for name, y in target.items():
        rows = _rows(y.size)
        block = np.stack([wide(x).ravel()[rows] for x in (y, *(column[name] for column in columns))], axis=1)
        sound = np.isfinite(block).all(1) & (noise[name].ravel()[rows] > 0) & np.isfinite(noise[name].ravel()[rows])
        block = block[sound] / noise[name].ravel()[rows][sound][:, None]
        d = None
        if decay is not None:
            d = wide(decay[name]).ravel()[rows][sound] / noise[name].ravel()[rows][sound]
            kept[name] = d, block
            if d @ d > 0:
                block = block - np.outer(d, d @ block / (d @ d))
        blocks.append(block)
    matrix = np.concatenate(blocks)
    y, X = matrix[:, 0], matrix[:, 1:]
    scale = np.linalg.norm(X, axis=0)
    if len(y) < 4 * max(1, X.shape[1]) or (scale == 0).any():
        return None
    normal = (X / scale).T @ (X / scale)
    if np.linalg.cond(normal) > 1e14:
        return None
    beta = np.linalg.lstsq(X / scale, y, rcond=None)[0] / scale
    errors = np.sqrt(np.diag(np.linalg.inv(normal))) / scale
    residual = float(np.abs(y - X @ beta).max())
    return Fit(tuple(map(Estimate, beta.tolist(), errors.tolist())), _decays(kept, beta, errors), residual)


def _decays(
    kept: Mapping[str, tuple[np.ndarray, np.ndarray]], beta: np.ndarray, errors: np.ndarray
) -> dict[str, Estimate]:
    found = {}
    for name, (d, block) in kept.items():
        if (square := float(d @ d)) > 0:
            carried = float(np.abs(d @ block[:, 1:] / square) @ errors)
            found[name] = Estimate(float(d @ (block[:, 0] - block[:, 1:] @ beta)) / square, square**-0.5 + carried)
    return found


def _rows(size: int) -> slice:
    return slice(None, None, max(1, size // MAX_ROWS))


@dataclass(frozen=True)
class UpdateFit:
    """What an update was computed with: u = -rate D - decay_k p."""

    rate: Estimate
    """lr sqrt(1 - b2^t) / (1 - b1^t) in Adam with bias correction, lr in SGD."""
    epsilon: Estimate
    """Adam: eps sqrt(1 - b2^t), or inside the root eps (1 - b2^t)."""
    decay: Mapping[str, Estimate]
    residual: float
    second: Estimate = field(default_factory=lambda: Estimate(0.0, 0.0))
    """The coefficient of the moment before the step in Nesterov's form."""

    @property
    def accepted(self) -> bool:
        return self.residual <= ACCEPTED


FORMS = ("plain", "inside", "amsgrad", "nesterov")
"""The forms of an update. `inside`: epsilon inside the root."""


def fit_update(transition: Transition, unit: float, form: str) -> UpdateFit | None:
    """Fit one form of an update to one step of one side. None if the form is not applicable or not determined."""
    decay = {name: wide(p) for name, p in transition.before.items()}
    update = {name: transition.update(name) for name in decay}
    noise = {
        name: 2 * unit * (np.abs(p) + np.abs(wide(transition.after[name]))) + 8 * unit * np.abs(update[name])
        for name, p in decay.items()
    }
    if form == "nesterov":  # the moment before the step is subtracted, which leaves its rounding
        noise = {name: n + 8 * unit * np.abs(update[name]).max(initial=0.0) for name, n in noise.items()}
    if not any(u.any() for u in update.values()):
        return UpdateFit(Estimate(0.0, 0.0), Estimate(0.0, np.inf), {}, 0.0)
    if SQUARE in transition.state and MOMENT in transition.state:
        return _fit_adam(transition, update, noise, decay, form)
    if form not in ("plain", "nesterov"):
        return None
    gradients = transition.gradients
    if MOMENTUM in transition.state:
        columns = [{name: transition.moment(MOMENTUM, name) for name in decay}]
    elif gradients is not None and form == "plain":
        columns = [
            {name: wide(gradients[name]) if name in gradients else np.zeros(p.shape) for name, p in decay.items()}
        ]
    else:
        return None
    if form == "nesterov":
        columns.append({name: transition.moment(MOMENTUM, name, before=True) for name in decay})
    fit = linear_fit(update, columns, noise, decay)
    if fit is None:
        return None
    zero = Estimate(0.0, 0.0)
    rate, second = fit.coefficients[0].times(-1), fit.coefficients[1] if form == "nesterov" else zero
    return UpdateFit(rate, zero, _negated(fit.decay), fit.residual, second)


def _fit_adam(transition: Transition, update: Tensors, noise: Tensors, decay: Tensors, form: str) -> UpdateFit | None:
    kind = "max_exp_avg_sq" if form == "amsgrad" else SQUARE
    if kind not in transition.state:
        return None
    m = {name: transition.moment(MOMENT, name) for name in update}
    v = {name: np.maximum(transition.moment(kind, name), 0) for name in update}
    earlier = {name: transition.moment(MOMENT, name, before=True) for name in update} if form == "nesterov" else None
    if earlier is not None and not any(x.any() for x in earlier.values()):
        return None
    size = float(np.median(np.concatenate([np.sqrt(x).ravel() for x in v.values()])))
    power = 2 if form == "inside" else 1
    fits = [
        _gauss_newton(update, noise, decay, m, v, earlier, form == "inside", start)
        for start in (0.0, *((size * 10.0**k) ** power for k in (-6, -4, -2, 0)))
    ]
    return min((fit for fit in fits if fit is not None), key=lambda fit: fit.residual, default=None)


def _gauss_newton(
    update: Tensors,
    noise: Tensors,
    decay: Tensors,
    m: Tensors,
    v: Tensors,
    earlier: Tensors | None,
    inside: bool,
    epsilon: float,
) -> UpdateFit | None:
    """Fit rate and decay linearly and epsilon by Gauss-Newton steps, from a first value of epsilon."""
    mixed = 0.0  # the weight of `earlier` relative to m
    for iteration in range(MAX_ITERATIONS + 1):
        numerator = m if earlier is None else {name: m[name] + mixed * earlier[name] for name in m}
        with np.errstate(divide="ignore", invalid="ignore"):
            s = {name: np.sqrt(x + epsilon) if inside else np.sqrt(x) + epsilon for name, x in v.items()}
            direction = {name: np.where(m[name] == 0, 0.0, m[name] / s[name]) for name in m}
            slope = {name: -numerator[name] / (2 * s[name] ** 3 if inside else s[name] ** 2) for name in m}
        slope = {name: np.where(numerator[name] == 0, 0.0, x) for name, x in slope.items()}
        columns: list[Tensors] = [direction, slope]
        if earlier is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                columns.append({name: np.where(x == 0, 0.0, x / s[name]) for name, x in earlier.items()})
        fit = linear_fit(update, columns, noise, decay)
        if fit is None:
            return None
        rate, change = fit.coefficients[0].value, fit.coefficients[1].value
        if rate == 0:
            return None
        mixed = fit.coefficients[2].value / rate if earlier is not None else 0.0
        error, step = fit.coefficients[1].error / abs(rate), change / rate
        following = max(epsilon + step, epsilon / 10)
        if abs(following - epsilon) <= max(1e-13 * epsilon, 0.01 * error) or iteration == MAX_ITERATIONS:
            second = fit.coefficients[2] if earlier is not None else Estimate(0.0, 0.0)
            # Without convergence, for example because epsilon would have to be negative, the form explains nothing.
            residual = fit.residual if abs(step) <= max(SIGNIFICANT * error, 1e-9 * epsilon) else np.inf
            return UpdateFit(
                fit.coefficients[0].times(-1), Estimate(epsilon, error), _negated(fit.decay), residual, second
            )
        epsilon = following
    return None


def _negated(decay: Mapping[str, Estimate]) -> dict[str, Estimate]:
    return {name: estimate.times(-1) for name, estimate in decay.items()}

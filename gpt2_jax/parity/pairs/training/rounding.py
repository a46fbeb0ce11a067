"""How far two correct trainers may be apart after a step, from the dtype, the sizes and the steps before.

The bounds are elementwise, because Adam divides each element by its own size: an element whose gradient is rounding
noise, such as a bias before a normalization or the bias of attention's keys, moves by a whole learning rate in a random
direction. Such an element is found by comparing sqrt(v) with the noise of the gradient, and is excluded from then on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from gpt2_jax.parity.pairs.training.transitions import AVERAGE, COUNT, MOMENT, MOMENTUM, SQUARE, Transition, wide

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24}
"""Unit round-off: half the spacing of the dtype at 1."""

MARGIN = 32.0
"""Multiple of the expected rounding. `python -m parity.pairs.random_trainers` measures how much of it correct pairs
use."""

GROWTH = 8.0
"""A relative difference d of the path that the parameters have taken changes gradients by about d relative to
themselves. Curvature amplifies it in some directions."""

CORRECTION = 1000.0
"""1 - b2^t of Adam's bias correction has the absolute rounding error of 1, so the relative one is 1 / (1 - b2) times
the unit round-off. This allows for b2 up to 0.999. optax computes it in the dtype of the parameters, PyTorch in
float64."""

QUANTITIES = (
    "parameters before training",
    "state before training",
    "loss",
    "gradient",
    "first moment",
    "second moment",
    "momentum",
    "step count",
    "update",
    "average",
)
"""In the order in which a step computes them."""

STATES = {
    "first moment": MOMENT,
    "second moment": SQUARE,
    "momentum": MOMENTUM,
    "step count": COUNT,
    "average": AVERAGE,
}


@dataclass(frozen=True)
class Distance:
    """The largest difference of one tensor, as a multiple of its bound."""

    quantity: str
    name: str
    ratio: float
    difference: float
    bound: float
    index: tuple[int, ...] = ()

    def __str__(self) -> str:
        where = f"[{', '.join(map(str, self.index))}]" if self.index else ""
        return f"{self.name}{where}"


@dataclass
class Bounds:
    """Bounds of the differences of two trainers, step after step.

    Args:
        dtype: "float64" or "float32".
        terms: the largest number of terms in a sum: the largest axis of a parameter, or the elements of a batch.
        depth: the number of parameter tensors, which bounds the number of layers.
    """

    dtype: str
    terms: int
    depth: int
    start: Mapping[str, np.ndarray] = field(default_factory=dict)
    drift: float = 0.0
    """The largest difference of a parameter before this step, relative to the path so far."""
    scales: dict[str, float] = field(default_factory=dict)
    """Quantity -> the largest element so far."""
    noise: dict[str, np.ndarray] = field(default_factory=dict)
    """Parameter -> elements whose gradient is rounding noise."""

    @property
    def unit(self) -> float:
        return UNIT[self.dtype]

    @property
    def relative(self) -> float:
        """The bound of a gradient relative to the largest gradient: independent errors of `terms` terms in `depth`
        layers add as their square root, and the parameters' own difference adds to it."""
        return MARGIN * self.unit * math.sqrt(self.terms * self.depth) + GROWTH * self.drift

    def compare(self, left: Transition, right: Transition) -> list[Distance]:
        """The distances of one step, in the order of `QUANTITIES`."""
        distances = [self._loss(left, right)]
        if left.gradients is not None and right.gradients is not None:
            distances += self._moments("gradient", left.gradients, right.gradients)
        for quantity in ("first moment", "second moment", "momentum"):
            kind = STATES[quantity]
            if kind in left.state and kind in right.state:
                a, b = ({name: side.moment(kind, name) for name in left.before} for side in (left, right))
                if kind == SQUARE:
                    a, b = ({name: np.sqrt(np.maximum(v, 0)) for name, v in side.items()} for side in (a, b))
                distances += self._moments(quantity, a, b, (left, right) if kind != SQUARE else None)
        if COUNT in left.state and COUNT in right.state:
            for name in left.before:
                counts = [np.asarray(side.moment(COUNT, name).flat[0]) for side in (left, right)]
                distances.append(self._distance("step count", name, counts[0], counts[1], 0.5))
        distances += self._updates(left, right)
        if AVERAGE in left.state and AVERAGE in right.state:
            distances += self._averages(left, right)
        return distances

    def at_start(self, left: Transition, right: Transition) -> list[Distance]:
        """The distances before the first step."""
        self.start = left.before
        found = []
        for name, a in left.before.items():
            bound = 4 * self.unit * np.abs(wide(a)).max(initial=0.0)
            found.append(self._distance("parameters before training", name, wide(a), wide(right.before[name]), bound))
        for kind in (MOMENT, SQUARE, MOMENTUM, COUNT, AVERAGE):
            if kind in left.state and kind in right.state:
                for name in left.before:
                    both = [side.moment(kind, name, before=True) for side in (left, right)]
                    if kind == COUNT:
                        both = [np.asarray(x.flat[0]) for x in both]
                    bound = 4 * self.unit * np.abs(both[0]).max(initial=0.0)
                    distance = self._distance("state before training", f"{kind}/{name}", both[0], both[1], bound)
                    found.append(distance)
        return found

    def _loss(self, left: Transition, right: Transition) -> Distance:
        # A loss is a difference of logits, so it is no more exact than they are; their scale is at least about 1.
        bound = self.relative * max(1.0, abs(left.loss), abs(right.loss))
        return self._distance("loss", "", np.asarray(left.loss), np.asarray(right.loss), bound)

    def _scale(self, key: str, *arrays: Mapping[str, np.ndarray]) -> float:
        largest = max((float(np.abs(wide(a)).max(initial=0.0)) for side in arrays for a in side.values()), default=0.0)
        self.scales[key] = max(largest, self.scales.get(key, 0.0))
        return self.scales[key]

    def _moments(
        self,
        quantity: str,
        left: Mapping[str, np.ndarray],
        right: Mapping[str, np.ndarray],
        before: tuple[Transition, Transition] | None = None,
    ) -> list[Distance]:
        """Distances of what is linear in the gradients: a bound that is relative to the largest of all tensors."""
        bound = self.relative * self._scale(quantity, left, right)
        found = []
        for name in left.keys() | right.keys():
            a, b = (wide(side[name]) if name in side else np.zeros(1) for side in (left, right))
            earlier: np.ndarray | float = 0.0
            if before is not None and quantity in STATES:
                earlier = np.abs(np.subtract(*(side.moment(STATES[quantity], name, before=True) for side in before)))
            found.append(self._distance(quantity, name, a, b, bound + earlier))
        return found

    def _updates(self, left: Transition, right: Transition) -> list[Distance]:
        largest = self._scale("update", *({name: side.update(name) for name in side.before} for side in (left, right)))
        found = []
        for name, before in left.before.items():
            a, b = left.update(name), right.update(name)
            size, p = np.maximum(np.abs(a), np.abs(b)), np.abs(wide(before))
            bound = 4 * self.unit * (p + np.abs(wide(left.after[name]))) + np.abs(
                wide(before) - wide(right.before[name])
            )
            if self._is_normalized(left, name) and self._is_normalized(right, name):
                bound = bound + self._normalized((left, right), name, size)
                self.noise[name] = self.noise.get(name, np.zeros(p.shape, bool)) | np.isinf(bound)
            else:
                bound = bound + self.relative * largest
            found.append(self._distance("update", name, a, b, bound))
        return found

    def _is_normalized(self, side: Transition, name: str) -> bool:
        return name in side.state.get(SQUARE, {})

    def _normalized(self, sides: tuple[Transition, Transition], name: str, update: np.ndarray) -> np.ndarray:
        """The bound of -L m / s, with s = sqrt(v): L (dm + |m| / s ds) / s. Infinite where s is noise."""
        s = np.sqrt(np.maximum(np.minimum(*(side.moment(SQUARE, name) for side in sides)), 0))
        is_zero = ~np.logical_or(*(side.moment(SQUARE, name) != 0 for side in sides))
        ds = self.relative * self.scales.get("second moment", float(s.max(initial=0.0)))
        if all(MOMENT in side.state for side in sides):
            m = np.maximum(*(np.abs(side.moment(MOMENT, name)) for side in sides))
            dm = self.relative * self.scales.get("first moment", float(m.max(initial=0.0)))
        else:  # RMSprop divides the gradient itself, which is at most a few times sqrt(v)
            m, dm = s, 10 * ds
        with np.errstate(divide="ignore", invalid="ignore"):
            rates = np.where((s > 100 * ds) & (m > 100 * dm), update * s / m, np.nan)
            rate = float(np.nanquantile(rates, 0.9)) if np.isfinite(rates).any() else float(update.max(initial=0.0))
            bound = rate * (dm + m / s * ds) / s + (self.relative + CORRECTION * self.unit) * update
        bound = np.where(s <= 2 * ds, np.inf, bound)
        return np.where(is_zero & (m == 0), self.relative * update.max(initial=0.0), bound)  # without any gradient

    def _averages(self, left: Transition, right: Transition) -> list[Distance]:
        """An average of parameters differs at most by their largest difference, so this ratio may be close to 1."""
        found = []
        for name in left.before:
            a, b = left.moment(AVERAGE, name), right.moment(AVERAGE, name)
            averaged = [
                (left.moment(AVERAGE, name, before=True), right.moment(AVERAGE, name, before=True)),
                (wide(left.before[name]), wide(right.before[name])),
                (wide(left.after[name]), wide(right.after[name])),
            ]
            size = np.max([np.abs(x) for x, _ in averaged], axis=0)
            bound = sum(np.abs(x - y) for x, y in averaged) + 16 * self.unit * size
            found.append(self._distance("average", name, a, b, bound))
        return found

    def _distance(
        self, quantity: str, name: str, left: np.ndarray, right: np.ndarray, bound: np.ndarray | float
    ) -> Distance:
        difference = np.abs(left - right)
        bound = np.broadcast_to(np.asarray(bound, np.float64), difference.shape)
        if (noise := self.noise.get(name)) is not None and noise.shape == difference.shape:
            bound = np.where(noise, np.inf, bound)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(difference == 0, 0.0, difference / bound)
        ratio = np.where(np.isnan(ratio), np.inf, ratio)
        if not ratio.size:
            return Distance(quantity, name, 0.0, 0.0, 0.0)
        index = np.unravel_index(int(ratio.argmax()), ratio.shape)
        return Distance(
            quantity, name, float(ratio[index]), float(difference[index]), float(bound[index]), tuple(map(int, index))
        )

    def advance(self, left: Transition, right: Transition) -> None:
        """Measure the parameters' difference after a step, from which all later steps start."""
        path = difference = 0.0
        for name, after in left.after.items():
            path = max(path, float(np.abs(wide(after) - wide(self.start[name])).max(initial=0.0)))
            apart = np.abs(wide(after) - wide(right.after[name]))
            difference = max(difference, float(np.where(self.noise.get(name, False), 0.0, apart).max(initial=0.0)))
        self.drift = difference / path if path else 0.0

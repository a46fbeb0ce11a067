"""What is known about the first difference of two trainers, and the diagnosis that it allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from gpt2_jax.parity.pairs.training.diagnosis.betas import fit_betas
from gpt2_jax.parity.pairs.training.rounding import Bounds
from gpt2_jax.parity.pairs.training.trainers import Step
from gpt2_jax.parity.pairs.training.transitions import History, Transition, wide

Kind = Literal[
    "initialization",
    "data order",
    "randomness",
    "loss mask",
    "loss reduction",
    "gradient clipping",
    "gradient accumulation",
    "learning rate",
    "learning rate schedule",
    "epsilon",
    "betas",
    "bias correction",
    "weight decay",
    "amsgrad",
    "nesterov",
    "step count",
    "average",
    "dtype",
    "frozen parameter",
    "tied weights",
    "unknown",
]


@dataclass(frozen=True)
class Diagnosis:
    """The kind of the first difference."""

    kind: Kind
    """"unknown" where the evidence does not allow a kind."""
    evidence: tuple[str, ...]
    """Sentences with the numbers that show it."""
    names: tuple[str, ...] = ()
    """The parameters that the mistake concerns, if it does not concern all."""
    values: tuple[float | None, float | None] | None = None
    """The hyperparameter of the left and of the right side, where the kind has one and it could be determined."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Evidence:
    """The steps of both sides, and the place of the first difference."""

    step: int
    """Counted from 1."""
    quantity: str
    name: str
    left: History
    right: History
    bounds: Bounds
    batches: Sequence[Any]
    snapshots: tuple[Any, Any]
    """Of both sides before the step."""
    tied: tuple[Mapping[str, str], Mapping[str, str]] = field(default=({}, {}))
    """For each side, unmatched parameter -> the matched parameter with equal values."""

    @property
    def sides(self) -> tuple[History, History]:
        return self.left, self.right

    @property
    def at(self) -> tuple[Transition, Transition]:
        """The step of the first difference."""
        return self.left.transitions[self.step - 1], self.right.transitions[self.step - 1]

    @property
    def unit(self) -> float:
        return self.bounds.unit

    @cached_property
    def betas(self) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
        left, right = (fit_betas(side.transitions, self.unit) for side in self.sides)
        return left, right

    @cached_property
    def replays(self) -> tuple[list[Step] | None, list[Step] | None]:
        """The same step on each batch, for each side. None if the side cannot be replayed."""
        left, right = (self._replays(k) for k in (0, 1))
        return left, right

    @cached_property
    def replayed(self) -> tuple[list[Transition] | None, list[Transition] | None]:
        """`replays` with the left side's names and layouts."""
        left, right = (self._transitions(k) for k in (0, 1))
        return left, right

    def _transitions(self, k: int) -> list[Transition] | None:
        steps, side, first = self.replays[k], self.sides[k], self.at[k]
        if steps is None:
            return None
        return [
            Transition(
                first.before,
                side.arrays(step.parameters),
                step.loss,
                first.state_before,
                side.state(step.state),
                None if step.gradients is None else side.arrays(step.gradients),
            )
            for step in steps
        ]

    def _replays(self, k: int) -> list[Step] | None:
        if not self.is_replayable(k):
            return None
        try:
            return [self.sides[k].trainer.replay(self.snapshots[k], batch) for batch in self.batches]
        except Exception:  # a batch that the side cannot use says nothing about the difference
            return None

    def is_replayable(self, k: int) -> bool:
        """Whether a step from the same state with the same random numbers gives the same bits."""
        first, second = self._repeated[k]
        return first is not None and second is not None and _same_bits(first, second)

    def is_random(self, k: int) -> bool:
        """Whether the loss depends on random numbers."""
        if not self.is_replayable(k):
            return False
        first = self._repeated[k][0]
        try:
            others = [self.sides[k].trainer.replay(self.snapshots[k], self.batch, seed) for seed in (1, 2)]
        except Exception:
            return False
        return first is not None and any(other.loss != first.loss for other in others)

    @cached_property
    def _repeated(self) -> tuple[tuple[Step | None, Step | None], ...]:
        found: list[tuple[Step | None, Step | None]] = []
        for k, side in enumerate(self.sides):
            if self.snapshots[k] is None:
                found.append((None, None))
                continue
            try:
                steps = [side.trainer.replay(self.snapshots[k], self.batch) for _ in range(2)]
                found.append((steps[0], steps[1]))
            except Exception:  # a step that can be taken only once
                found.append((None, None))
        return tuple(found)

    @property
    def batch(self) -> Any:
        return self.batches[self.step - 1]

    def sound(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The elements of a tensor whose gradient is more than rounding noise."""
        noise = self.bounds.noise.get(name)
        return ~noise if noise is not None and noise.shape == shape else np.ones(shape, bool)


def _same_bits(first: Step, second: Step) -> bool:
    return first.loss == second.loss and all(
        np.array_equal(first.parameters[name], second.parameters[name]) for name in first.parameters
    )


def unknown(*evidence: str) -> Diagnosis:
    return Diagnosis("unknown", evidence)


NARROW = {"bfloat16": 8, "float16": 11, "float32": 24}
"""dtype -> significant bits."""

MIN_ELEMENTS = 8
"""Values of a narrow dtype by chance are unlikely among this many."""


def narrow_dtype(values: np.ndarray, others: np.ndarray, unit: float) -> str | None:
    """The dtype, narrower than claimed, to which `values` but not `others` are rounded, if they differ by its rounding.

    Args:
        unit: the unit round-off of the claimed dtype.
    """
    for dtype, bits in NARROW.items():
        if 2.0**-bits <= unit:
            continue
        scale = np.abs(others).max(initial=0.0)
        is_small = np.abs(values - others).max(initial=0.0) <= 16 * 2.0**-bits * scale
        if is_small and is_rounded(values, bits, unit) and not is_rounded(others, bits, unit):
            return dtype
    return None


def is_rounded(values: np.ndarray, bits: int, unit: float) -> bool:
    """Whether all values have at most this many significant bits, and at least one is not zero."""
    mantissa, _ = np.frexp(values[values != 0])
    scaled = mantissa * 2.0**bits
    # A later product by a constant rounds once more in the claimed dtype.
    return bool(mantissa.size) and bool((np.abs(scaled - np.rint(scaled)) <= 4 * unit * 2.0**bits).all())


def listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def norm(tensors: Mapping[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(float((wide(x) ** 2).sum()) for x in tensors.values())))

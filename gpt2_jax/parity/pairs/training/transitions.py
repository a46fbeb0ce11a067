"""The recorded steps of two trainers, with the names and layouts of the left one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpt2_jax.parity.pairs.matching.match import Match, Matching, Names, match_names
from gpt2_jax.parity.pairs.training.trainers import Arrays, Step, Trainer

MOMENT, SQUARE, MOMENTUM, COUNT, AVERAGE = "exp_avg", "exp_avg_sq", "momentum_buffer", "count", "ema"


@dataclass(frozen=True)
class Transition:
    """One step of one side."""

    before: Arrays
    after: Arrays
    loss: float
    state_before: Mapping[str, Arrays]
    """Kind of state ("exp_avg") -> parameter -> array. Missing arrays are zeros."""
    state: Mapping[str, Arrays]
    gradients: Arrays | None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def update(self, name: str) -> np.ndarray:
        """The change of a parameter, in float64."""
        return wide(self.after[name]) - wide(self.before[name])

    def moment(self, kind: str, name: str, before: bool = False) -> np.ndarray:
        """A tensor of the optimizer state in float64. Zeros where the optimizer has none yet."""
        found = (self.state_before if before else self.state).get(kind, {}).get(name)
        return np.zeros(self.before[name].shape) if found is None else wide(found)


@dataclass
class History:
    """All recorded steps of one side."""

    trainer: Trainer
    transforms: Mapping[str, Match]
    """This side's name -> its match."""
    is_right: bool
    transitions: list[Transition] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.trainer.name

    def arrays(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """Rename arrays, and transform those of the right side to the left layout. Unmatched names are dropped.

        Both sides then have the same order.
        """
        found = {}
        for name, match in self.transforms.items():
            if (array := arrays.get(name)) is not None:
                found[match.left] = match.transform(array) if self.is_right and array.ndim else array
        return found

    def state(self, arrays: Arrays) -> dict[str, dict[str, np.ndarray]]:
        kinds: dict[str, dict[str, np.ndarray]] = {}
        for key, array in arrays.items():
            kind, _, name = key.partition("/")
            kinds.setdefault(kind, {})[name] = array
        return {kind: self.arrays(found) for kind, found in kinds.items()}

    def record(self, before: Arrays, state_before: Arrays, step: Step) -> Transition:
        return Transition(
            self.arrays(before),
            self.arrays(step.parameters),
            step.loss,
            self.state(state_before),
            self.state(step.state),
            None if step.gradients is None else self.arrays(step.gradients),
            step.settings,
        )


def pair_parameters(left: Trainer, right: Trainer, names: Names) -> Matching:
    """Match the parameters of two trainers. Equal sets of names and shapes need no convention.

    Raises:
        MatchError: see `match_names`.
    """
    ours, theirs = left.parameters(), right.parameters()
    if names is None and {n: a.shape for n, a in ours.items()} == {n: a.shape for n, a in theirs.items()}:
        return Matching(tuple(Match(name, name, _same, "same name") for name in ours))
    return match_names(ours, theirs, names, left_layouts=left.layouts(), right_layouts=right.layouts())


def aliases(arrays: Arrays, unmatched: Sequence[str], matched: Sequence[str]) -> dict[str, str]:
    """Unmatched name -> the matched name on the same side with equal values, as of a tied parameter."""
    found = {}
    for name in unmatched:
        for other in matched:
            if np.array_equal(arrays[name], arrays[other]):
                found[name] = other
    return found


def wide(array: np.ndarray) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def _same(array: np.ndarray) -> np.ndarray:
    return array

"""Trainers that `compare_training` can observe: what one is, and the one for JAX and optax.

The trainer for PyTorch is in `torch_trainer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bridge import BridgeError
from bridge.errors import quoted
from gpt2_jax.parity.pairs.matching.layouts import Layout

Arrays = Mapping[str, np.ndarray]


class TrainerError(BridgeError):
    """A trainer, or what it returned, cannot be compared."""


@dataclass(frozen=True)
class Step:
    """The result of one training step."""

    loss: float
    parameters: Arrays
    """After the step."""
    state: Arrays
    """Optimizer state and other tensors, "exp_avg/NAME", "exp_avg_sq/NAME", "momentum_buffer/NAME", "count/NAME" and
    "ema/NAME", where NAME is that of a parameter."""
    gradients: Arrays | None = None
    """What the optimizer received, if it is known."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Hyperparameters that the optimizer reports, for example "lr"."""


class Trainer(ABC):
    """A model, its optimizer and a function that trains them for one step."""

    name: str

    @abstractmethod
    def parameters(self) -> Arrays:
        """The parameters before the next step."""

    @abstractmethod
    def step(self, batch: Any) -> Step:
        """Train for one step."""

    def layouts(self) -> Mapping[str, Layout]:
        """The layouts of parameters whose module's kind is known."""
        return {}

    def state(self) -> Arrays:
        """The optimizer state before the next step, with the names of `Step.state`."""
        return {}

    def snapshot(self) -> Any:
        """Return a copy of everything that a step changes, or None if the trainer cannot be copied."""
        return None

    def replay(self, snapshot: Any, batch: Any, seed: int = 0) -> Step:
        """Train for one step from a snapshot, and leave the trainer as it was.

        Equal seeds give equal random numbers, and different seeds give different ones.
        """
        raise TrainerError(f"{self.name}: this trainer cannot repeat a step")

    def loss(self, snapshot: Any, batch: Any) -> np.ndarray | None:
        """The loss of a batch with the parameters of a snapshot, without training: one value, or one per example or
        token. None if the trainer has no such function."""
        return None


def scalar(loss: Any, name: str) -> float:
    """A loss as a float, or an error that says what the step should return."""
    try:
        return float(loss)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TrainerError(f"{name}: the step must return a loss with one value, not {quoted(str(loss))}") from error


@contextmanager
def numpy_seed(seed: int) -> Iterator[None]:
    """Seed numpy's global generator within the block, and restore it afterwards."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)

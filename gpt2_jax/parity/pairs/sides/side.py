"""What `compare` needs of a side: its parameters, and what it computes from inputs.

A side can be any object with these methods. `torch_side`, `linen_side`, `nnx_side`, `function_side` and `golden_side`
make them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from bridge import BridgeError
from gpt2_jax.parity.pairs.matching.layouts import Layout

Arrays = Mapping[str, np.ndarray]
"""Name -> array."""

Inputs = tuple[np.ndarray, ...]
"""The positional arguments of both sides."""

DTYPES = ("float64", "float32", "bfloat16")
"""The dtypes in which a side can compute."""

OUTPUT = "output"
"""The name of a single output. The elements of a tuple are `output[0]`, `output[1]`, ..., those of a dictionary have
their keys."""


class SideError(BridgeError):
    """A side failed. `place` is the innermost module that was running, or ""."""

    def __init__(self, side: str, place: str, message: str) -> None:
        super().__init__(f"{side}{' at ' + place if place else ''}: {message}")
        self.side: str = side
        self.place: str = place
        self.message: str = message


@dataclass(frozen=True)
class Forward:
    """What one forward pass computed. The arrays have the dtypes in which the side computed them."""

    outputs: Arrays
    intermediates: Arrays = field(default_factory=dict)
    """In the order of the forward pass. `NAME` is the output of a module, and `NAME:input` its first argument."""
    state: Arrays = field(default_factory=dict)
    """The buffers that the pass updated, such as running statistics, by parameter name."""


@dataclass(frozen=True)
class Description:
    """The layouts of a side's parameters, and its modes."""

    layouts: Mapping[str, Layout] = field(default_factory=dict)
    """Parameter name -> layout, where the kind of its module is known."""
    buffers: frozenset[str] = frozenset()
    """Names in `parameters()` that are not trained, such as running statistics, where the side knows them."""
    training: tuple[str, ...] = ()
    """Modules that are in training mode: dropout that is on, and norms that use the statistics of the batch."""


class Side(Protocol):
    """One of two implementations."""

    name: str
    """For the report. The names of the two sides must differ."""
    dtypes: tuple[str, ...]
    """The dtypes in which it can compute, out of `DTYPES`."""

    def parameters(self) -> Arrays:
        """Parameters and floating-point buffers in their stored dtypes. Tied parameters are the same array."""

    def describe(self, inputs: Inputs) -> Description:
        """Layouts and modes."""

    def forward(self, inputs: Inputs, dtype: str) -> Forward:
        """Run on inputs, with parameters and floating-point inputs cast to `dtype`."""

    def gradients(self, inputs: Inputs, dtype: str) -> tuple[float, Arrays] | None:
        """The loss, and its gradient for each trainable parameter. None if the side cannot compute gradients."""

"""PyTorch's LSTM cell, and the cell as a function of JAX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch


@dataclass(frozen=True)
class Choices:
    """What a port can choose. The defaults are right."""

    forget_bias: float = 0.0
    both_biases: bool = True
    exchanged_activations: bool = False
    """Sigmoid for the candidate and tanh for the input gate."""
    exchanged_outputs: bool = False
    """(c, h) instead of (h, c)."""
    no_output_tanh: bool = False
    gates: str = "ifgo"


def cell(choices: Choices = Choices()) -> Any:
    """A function of (params, x [B, D], h [B, H], c [B, H]) that returns h, c and the gates."""

    def call(params: Any, x: jax.Array, h: jax.Array, c: jax.Array) -> Any:
        z = x @ params["weight_ih"].T + params["bias_ih"] + h @ params["weight_hh"].T
        z = z + params["bias_hh"] if choices.both_biases else z
        gates = dict(zip(choices.gates, jnp.split(z, 4, axis=-1), strict=True))
        sigmoid, tanh = (jnp.tanh, jax.nn.sigmoid) if choices.exchanged_activations else (jax.nn.sigmoid, jnp.tanh)
        c = jax.nn.sigmoid(gates["f"] + choices.forget_bias) * c + sigmoid(gates["i"]) * tanh(gates["g"])
        h = jax.nn.sigmoid(gates["o"]) * (c if choices.no_output_tanh else jnp.tanh(c))
        return (c, h) if choices.exchanged_outputs else (h, c)

    return call


class TorchCell(torch.nn.Module):
    """`torch.nn.LSTMCell` with positional states."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.cell = torch.nn.LSTMCell(size, hidden)

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> Any:
        return self.cell(x, (h, c))


def torch_cell(size: int = 6, hidden: int = 4, seed: int = 0) -> TorchCell:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TorchCell(size, hidden).eval()


def converted(module: TorchCell) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in module.cell.named_parameters()}


def inputs_of(size: int = 6, hidden: int = 4, batch: int = 3, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(batch, n)).astype(np.float32) for n in (size, hidden, hidden))

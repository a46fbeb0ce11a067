"""One small network as a PyTorch module, a Linen module, an NNX module and a JAX function, with the same weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from gpt2_jax.parity.pairs.sides.flax_module import linen_side, nnx_side
from gpt2_jax.parity.pairs.sides.jax_function import function_side
from gpt2_jax.parity.pairs.sides.side import Side

WIDTHS = (5, 8, 8, 3)


def weights(seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Flax parameters, by layer."""
    rng = np.random.default_rng(seed)
    return {
        f"fc{k}": {
            "kernel": rng.normal(size=(a, b)).astype(np.float32),
            "bias": rng.normal(size=b).astype(np.float32),
        }
        for k, (a, b) in enumerate(itertools.pairwise(WIDTHS))
    }


def inputs(seed: int = 1) -> tuple[np.ndarray, ...]:
    return (np.random.default_rng(seed).normal(size=(4, WIDTHS[0])).astype(np.float32),)


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for k, width in enumerate(WIDTHS[1:-1]):
            x = nn.tanh(nn.Dense(width, name=f"fc{k}")(x))
        return nn.Dense(WIDTHS[-1], name="fc2")(x)


class NnxMLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fc0, self.fc1, self.fc2 = (nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(WIDTHS))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jnp.tanh(self.fc1(jnp.tanh(self.fc0(x)))))


def function(params: Any, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    values = {}
    for k in range(3):
        layer = params[f"fc{k}"]
        values[f"fc{k}"] = x @ layer["kernel"] + layer["bias"]
        x = jnp.tanh(values[f"fc{k}"])
    return values["fc2"], values


def torch_mlp(params: dict[str, dict[str, np.ndarray]] | None = None) -> Any:
    import torch

    class TorchMLP(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc0, self.fc1, self.fc2 = (torch.nn.Linear(a, b) for a, b in itertools.pairwise(WIDTHS))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(self.fc1(self.fc0(x).tanh()).tanh())

    module = TorchMLP()
    state = {}
    for name, layer in (params or weights()).items():
        state[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(layer["kernel"].T))
        state[f"{name}.bias"] = torch.from_numpy(layer["bias"].copy())
    module.load_state_dict(state)
    return module


def torch_mlp_side() -> Side:
    from gpt2_jax.parity.pairs.sides.torch_module import torch_side

    return torch_side(torch_mlp())


def linen_mlp_side() -> Side:
    return linen_side(LinenMLP(), {"params": weights()})


def nnx_mlp_side() -> Side:
    module = NnxMLP(nnx.Rngs(0))
    for name, layer in weights().items():
        for leaf, value in layer.items():
            getattr(getattr(module, name), leaf).set_value(jnp.asarray(value))
    return nnx_side(module)


def function_mlp_side() -> Side:
    return function_side(function, weights(), aux=True)


SIDES: dict[str, Callable[[], Side]] = {
    "torch": torch_mlp_side,
    "linen": linen_mlp_side,
    "nnx": nnx_mlp_side,
    "function": function_mlp_side,
}

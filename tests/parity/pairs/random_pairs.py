"""Random pairs of correct implementations, none of which may fail, and how close their errors come to the tolerances.

    PYTHONPATH=.:tests python -m parity.pairs.random_pairs --pairs 1000 --state FILE [--seed 0]

`make test-pairs` runs it. The state file keeps what is done, so that the same command continues after Ctrl-C. Prints,
for each model and quantity, the smallest, the median and the largest error, relative to its tolerance. Exits with 1 at
the first pair that fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn
from flax import nnx
from parity.pairs import lstm, resnet, rotary_gpt
from parity.pairs.mistakes import Pair

from gpt2_jax.parity import Report
from gpt2_jax.parity.pairs.compare import compare
from gpt2_jax.parity.pairs.padding import Pad, pad_tokens
from gpt2_jax.parity.pairs.sides.flax_module import linen_side, nnx_side
from gpt2_jax.parity.pairs.sides.jax_function import function_side
from gpt2_jax.parity.pairs.sides.side import DTYPES, Side
from gpt2_jax.parity.pairs.sides.torch_module import torch_side

Rng = np.random.Generator
ACTIVATIONS: Mapping[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "tanh": (torch.tanh, jnp.tanh),
    "relu": (torch.relu, nn.relu),
    "gelu": (torch.nn.functional.gelu, lambda x: nn.gelu(x, approximate=False)),
    "gelu_tanh": (lambda x: torch.nn.functional.gelu(x, approximate="tanh"), lambda x: nn.gelu(x, approximate=True)),
    "silu": (torch.nn.functional.silu, nn.silu),
}
"""Name -> PyTorch's and JAX's."""


class TorchMLP(torch.nn.Module):
    def __init__(self, widths: tuple[int, ...], activation: str, norm: bool) -> None:
        super().__init__()
        for k, (a, b) in enumerate(itertools.pairwise(widths)):
            self.add_module(f"fc{k}", torch.nn.Linear(a, b))
            if norm and k < len(widths) - 2:
                self.add_module(f"ln{k}", torch.nn.LayerNorm(b))
        self.count, self.activation, self.norm = len(widths) - 1, ACTIVATIONS[activation][0], norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for k in range(self.count):
            x = self.get_submodule(f"fc{k}")(x)
            if k < self.count - 1:
                x = self.activation(self.get_submodule(f"ln{k}")(x) if self.norm else x)
        return x


class LinenMLP(nn.Module):
    widths: tuple[int, ...]
    activation: str
    norm: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for k, width in enumerate(self.widths[1:]):
            x = nn.Dense(width, name=f"fc{k}")(x)
            if k < len(self.widths) - 2:
                x = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=f"ln{k}")(x) if self.norm else x
                x = ACTIVATIONS[self.activation][1](x)
        return x


class NnxMLP(nnx.Module):
    def __init__(self, widths: tuple[int, ...], activation: str, norm: bool, rngs: nnx.Rngs) -> None:
        for k, (a, b) in enumerate(itertools.pairwise(widths)):
            setattr(self, f"fc{k}", nnx.Linear(a, b, rngs=rngs))
            if norm and k < len(widths) - 2:
                setattr(self, f"ln{k}", nnx.LayerNorm(b, epsilon=1e-5, use_fast_variance=False, rngs=rngs))
        self.count, self.activation, self.norm = len(widths) - 1, activation, norm

    def __call__(self, x: jax.Array) -> jax.Array:
        for k in range(self.count):
            x = getattr(self, f"fc{k}")(x)
            if k < self.count - 1:
                x = ACTIVATIONS[self.activation][1](getattr(self, f"ln{k}")(x) if self.norm else x)
        return x


def function_mlp(widths: tuple[int, ...], activation: str, norm: bool) -> Callable[..., Any]:
    def call(params: Any, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        values = {}
        for k in range(len(widths) - 1):
            x = values[f"fc{k}"] = x @ params[f"fc{k}"]["kernel"] + params[f"fc{k}"]["bias"]
            if k < len(widths) - 2:
                if norm:
                    centered = x - x.mean(-1, keepdims=True)
                    x = centered / jnp.sqrt(jnp.square(centered).mean(-1, keepdims=True) + 1e-5)
                    x = values[f"ln{k}"] = x * params[f"ln{k}"]["scale"] + params[f"ln{k}"]["bias"]
                x = ACTIVATIONS[activation][1](x)
        return x, values

    return call


def random_mlp(rng: Rng) -> Pair:
    """Two of the four kinds of sides, in a random order."""
    widths = tuple(int(w) for w in np.exp(rng.uniform(np.log(2), np.log(96), rng.integers(3, 8))).round())
    spec = (widths, str(rng.choice([*ACTIVATIONS])), bool(rng.integers(2)))
    dtype = rng.choice([np.float32, np.float64])
    tree: dict[str, Any] = {}
    for k, (a, b) in enumerate(itertools.pairwise(widths)):
        kernel = rng.normal(scale=rng.uniform(0.5, 2) * a**-0.5, size=(a, b))
        tree[f"fc{k}"] = {"kernel": kernel.astype(dtype), "bias": rng.normal(size=b).astype(dtype)}
        if spec[2] and k < len(widths) - 2:
            tree[f"ln{k}"] = {"scale": rng.uniform(0.5, 1.5, b).astype(dtype), "bias": rng.normal(size=b).astype(dtype)}
    kinds = {
        "torch": lambda: _torch_mlp(spec, tree),
        "linen": lambda: linen_side(LinenMLP(*spec), {"params": tree}, name="linen"),
        "nnx": lambda: _nnx_mlp(spec, tree),
        "function": lambda: function_side(function_mlp(*spec), tree, aux=True),
    }
    left, right = rng.choice([*kinds], 2, replace=False, p=[0.5, 0.2, 0.15, 0.15])
    x = rng.normal(size=(rng.integers(1, 9), widths[0])).astype(np.float32)
    return kinds[left](), kinds[right](), (x,)


def _torch_mlp(spec: tuple[Any, ...], tree: Mapping[str, Any]) -> Side:
    module = TorchMLP(*spec)
    state = {}
    for name, layer in tree.items():
        weight = layer["kernel"].T if "kernel" in layer else layer["scale"]
        state[f"{name}.weight"], state[f"{name}.bias"] = (torch.tensor(x.copy()) for x in (weight, layer["bias"]))
    module.to(state["fc0.weight"].dtype).load_state_dict(state)
    return torch_side(module.eval())


def _nnx_mlp(spec: tuple[Any, ...], tree: Mapping[str, Any]) -> Side:
    module = NnxMLP(*spec, nnx.Rngs(0))
    for name, layer in tree.items():
        for leaf, value in layer.items():
            getattr(getattr(module, name), leaf).set_value(value)
    return nnx_side(module)


def random_gpt(rng: Rng) -> Pair:
    heads, head = int(rng.choice([2, 4])), int(rng.choice([4, 8, 16]))
    config = rotary_gpt.Config(
        vocab=int(rng.integers(11, 80)),
        width=heads * head,
        layers=int(rng.integers(1, 3)),
        heads=heads,
        kv_heads=int(rng.choice([1, 2])),
        feed_forward=int(rng.integers(8, 97)),
        eps=float(rng.choice([1e-5, 1e-6])),
    )
    with torch.random.fork_rng():
        torch.manual_seed(int(rng.integers(2**31)))
        model = rotary_gpt.TorchGPT(config).eval()
    port = rotary_gpt.FlaxGPT(config, rotary_gpt.Choices(eps=config.eps))
    right = linen_side(port, {"params": rotary_gpt.converted(model, config)})
    shape = (int(rng.integers(1, 4)), int(rng.integers(2, 20)))
    return torch_side(model), right, rotary_gpt.inputs_of(config, shape, int(rng.integers(2**31)))


def random_block(rng: Rng) -> Pair:
    config = resnet.Config(
        channels=int(rng.integers(1, 6)),
        width=int(rng.integers(2, 25)),
        stride=int(rng.integers(1, 3)),
        eps=float(rng.choice([1e-5, 1e-3])),
    )
    block = resnet.torch_block(config, int(rng.integers(2**31)))
    port = resnet.FlaxBlock(config, resnet.Choices(eps=config.eps))
    right = linen_side(port, resnet.converted(block), images="NHWC")
    batch, size, seed = int(rng.integers(1, 4)), int(rng.integers(4, 13)), int(rng.integers(2**31))
    return torch_side(block), right, resnet.inputs_of(config, batch, size, seed)


def random_cell(rng: Rng) -> Pair:
    size, hidden, seed = int(rng.integers(2, 65)), int(rng.integers(2, 65)), int(rng.integers(2**31))
    module = lstm.torch_cell(size, hidden, seed)
    right = function_side(lstm.cell(), lstm.converted(module))
    return torch_side(module), right, lstm.inputs_of(size, hidden, int(rng.integers(1, 9)), seed)


KINDS: Mapping[str, tuple[float, Callable[[Rng], Pair]]] = {
    "MLP": (0.45, random_mlp),
    "LSTM cell": (0.25, random_cell),
    "ResNet block": (0.2, random_block),
    "GPT": (0.1, random_gpt),
}
"""Kind -> its share, and a function that draws a pair."""


def random_report(seed: int) -> tuple[str, Report]:
    """Draw a pair from a seed and compare it."""
    rng = np.random.default_rng(seed)
    kind = str(rng.choice([*KINDS], p=[share for share, _ in KINDS.values()]))
    left, right, inputs = KINDS[kind][1](rng)
    pads: dict[str, Pad] = {}
    if kind == "GPT" and rng.integers(2):
        side = str(rng.choice(["left", "right"]))
        pads = {f"padded {side}": pad_tokens(side, by=int(rng.integers(1, 5)))}
    dtypes = DTYPES if rng.random() < 0.3 else DTYPES[:2]
    return kind, compare(left, right, inputs, pads=pads, dtypes=dtypes)


def ratios(report: Report) -> dict[str, float]:
    """Quantity -> the largest error relative to its tolerance."""
    found: dict[str, float] = {}
    for check in report.checks:
        for m in check.measurements:
            if m.tolerance:
                dtype = m.name[:4] if m.name[:4] in ("fp32", "bf16") else "fp64"
                name = f"{dtype} {check.name}"
                found[name] = max(found.get(name, 0.0), m.value / m.tolerance)
    return found


def failures(report: Report) -> str:
    wrong = [
        f"{c.name}: {m.name}: {m.value:.4g} > {m.tolerance} at {m.location}"
        for c in report.checks
        for m in c.measurements
        if not m.passed
    ]
    return re.sub(r"\s+", " ", "; ".join(wrong))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path)
    arguments = parser.parse_args()
    state: dict[str, Any] = {"next": arguments.seed, "ratios": {}}
    if arguments.state is not None and arguments.state.exists():
        state = json.loads(arguments.state.read_text())
    start = time.perf_counter()
    while state["next"] < arguments.seed + arguments.pairs:
        kind, report = random_report(state["next"])
        if not report.passed:
            print(f"--seed {state['next']} --pairs 1: {kind}: {failures(report)}")
            return 1
        for name, ratio in ratios(report).items():
            state["ratios"].setdefault(f"{kind} | {name}", []).append(ratio)
        state["next"] += 1
        if arguments.state is not None:
            temporary = arguments.state.with_suffix(".new")
            temporary.write_text(json.dumps(state))
            os.replace(temporary, arguments.state)
        jax.clear_caches()  # no program is used twice
    print("| model | quantity | pairs | smallest | median | largest error / tolerance |\n|---|---|---|---|---|---|")
    for name, values in sorted(state["ratios"].items()):
        print(f"| {name} | {len(values)} | {min(values):.2g} | {median(values):.2g} | {max(values):.2g} |")
    print(f"{state['next'] - arguments.seed} random pairs agree ({time.perf_counter() - start:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The float32 rounding error of both backends at 124M parameters, and what the highest precision costs in JAX.

    python -m tests.benchmarks.rounding [--length 512] [--rounds 5]

Errors are root mean squares of the logits' differences from float64, of a model with random weights. The forward
passes of both precisions alternate; the benchmark prints medians and the range of the pairs.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch

import bridge
import gpt2_jax
import gpt2_torch
from bridge import GPT2Config
from gpt2_jax.parity.metrics import rms

PRECISIONS = ("default", "highest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    reference = gpt2_torch.GPT2(GPT2Config()).eval()
    for parameter in reference.parameters():
        if parameter.ndim == 1:  # biases and norms, which are zeros and ones
            torch.nn.init.normal_(parameter.data, parameter.mean().item(), 0.02)
    state = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    params = jax.tree.map(jnp.array, bridge.to_flax(state, GPT2Config(), stacked=True))
    ids = np.random.default_rng(0).integers(0, GPT2Config().vocab_size, (1, options.length))
    with torch.inference_mode():
        expected = reference(torch.from_numpy(ids)).numpy()
        exact = reference.double()(torch.from_numpy(ids)).numpy()
    error = rms(expected - exact)
    print(f"PyTorch: error {error:.2e}")
    model, forwards = gpt2_jax.GPT2(GPT2Config(), scan=True), {}
    for precision in PRECISIONS:
        with jax.default_matmul_precision(precision):
            forwards[precision] = jax.jit(model.apply).lower({"params": params}, ids).compile()
        logits = np.asarray(forwards[precision]({"params": params}, ids))
        print(f"JAX, {precision}: error {rms(logits - exact) / error:.2f} times PyTorch's")
    times: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    for _ in range(options.rounds):
        for precision, forward in forwards.items():
            began = time.perf_counter()
            jax.block_until_ready(forward({"params": params}, ids))
            times[precision].append(time.perf_counter() - began)
    ratios = sorted(b / a for a, b in zip(*times.values(), strict=True))
    seconds = {precision: round(statistics.median(each), 2) for precision, each in times.items()}
    print(
        f"1 x {options.length}: seconds {seconds}; highest takes {statistics.median(ratios):.2f} times as long", end=" "
    )
    print(f"({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()

"""Training nanoGPT's CPU configuration: the port beside the reference.

    python -m tests.benchmarks.train [pairs]

Each runs in a process of its own, as `gpt2 train` does, in turns; medians over the pairs, and the spread. Beside
them the time that the matrix products alone would take at the peak, measured with products of 2048 x 2048.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from gpt2_jax.train.config import PRESETS
from gpt2_jax.train.throughput import flops_per_token, peak_flops

CONFIG = PRESETS["shakespeare-char"]
WARM_UP, STEPS, ROUNDS = 10, 20, 6


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    found = [{name: measured_apart(name) for name in ("torch", "jax")} for _ in range(pairs)]
    peak = peak_flops("float32")[0]
    tokens = CONFIG.batch_size * CONFIG.length
    bound = flops_per_token(CONFIG.model, CONFIG.length) * tokens / peak * 1e3
    print(f"{CONFIG.preset}: {CONFIG.batch_size} x {CONFIG.length} tokens a step, median of {pairs} processes each")
    for name in ("torch", "jax"):
        times = sorted(pair[name] for pair in found)
        middle = statistics.median(times)
        print(
            f"{name:<6} {middle:6.1f} ms a step ({times[0]:.1f} to {times[-1]:.1f})  "
            f"{tokens / middle * 1e3:8,.0f} tokens/s  {bound / middle:.0%} of the matrix products' peak"
        )
    ratios = sorted(pair["torch"] / pair["jax"] for pair in found)
    print(f"jax is {statistics.median(ratios):.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    print(f"at the peak of {peak / 1e9:.0f} GFLOP/s the matrix products take {bound:.1f} ms")


def measured_apart(name: str) -> float:
    """Milliseconds a step, in a new process."""
    command = [sys.executable, "-m", "tests.benchmarks.train", f"--{name}"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def milliseconds_a_step(step: Callable[[], Any], finish: Callable[[], Any]) -> float:
    for _ in range(WARM_UP):
        step()
    finish()
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(STEPS):
            step()
        finish()
        times.append((time.perf_counter() - began) / STEPS * 1e3)
    return statistics.median(times)


def batch() -> dict[str, np.ndarray]:
    windows = np.random.default_rng(0).integers(0, CONFIG.model.vocab_size, (CONFIG.batch_size, CONFIG.length + 1))
    return {"input_ids": windows[:, :-1].astype(np.int32), "labels": windows[:, 1:].astype(np.int32)}


def torch_time() -> float:
    import torch

    import gpt2_torch
    from gpt2_torch.train import adamw, train_step

    model = gpt2_torch.GPT2(CONFIG.model)
    optimizer = adamw(model, learning_rate=1e-3, beta2=0.99)
    tensors = {name: torch.from_numpy(array).long() for name, array in batch().items()}
    return milliseconds_a_step(lambda: train_step(model, optimizer, tensors, learning_rate=1e-3), lambda: None)


def jax_time() -> float:
    import jax

    from gpt2_jax.train import make_optimizer, make_train_step
    from gpt2_jax.train.begin import first_state, make_model
    from gpt2_jax.train.memory import keep_freed_memory

    keep_freed_memory()
    model, tx = make_model(CONFIG), make_optimizer(CONFIG.optimizer, CONFIG.steps)
    state = first_state(CONFIG, model, tx, None)
    train_step = make_train_step(model, tx)
    arrays = batch()

    def step() -> None:
        nonlocal state
        state, _ = train_step(state, arrays)

    return milliseconds_a_step(step, lambda: jax.block_until_ready(state))


if __name__ == "__main__":
    if sys.argv[1:] in (["--torch"], ["--jax"]):
        print(json.dumps({"--torch": torch_time, "--jax": jax_time}[sys.argv[1]]()))
    else:
        main()

"""Lower bounds of the time of a task: the FLOPs and bytes that it needs, and the device's rates.

A separate worker process measures the rates between the rounds of the benchmark, so that they reflect changes in the
machine's speed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import bridge
from bridge import GPT2Config

READ_BYTES = 2**29
"""Size of the array that is read to measure bandwidth. It exceeds the caches of most machines."""
READ_REPEATS = 5


def min_flops(task: str, config: GPT2Config, batch_size: int, seq_len: int) -> float:
    """Minimum number of FLOPs of one training step or one forward pass.

    A forward pass needs 2 FLOPs per token and weight of a matrix product, including the output projection but not the
    position embedding. Attention needs 2 D T per token and layer, because each of its two products covers half of the
    T x T pairs. The backward pass has two products for each product of the forward pass. Training thus needs
    6 N + 6 L D T per token. Recomputation (remat) is not counted.
    """
    D, L = config.n_embd, config.n_layer
    weights = L * (4 * D**2 + 2 * D * config.feed_forward_size) + config.vocab_size * D
    forward = batch_size * seq_len * (2 * weights + 2 * L * D * seq_len)
    return {"train": 3.0, "forward": 1.0}[task] * forward


def min_bytes(config: GPT2Config, dtype: str) -> int:
    """Minimum number of bytes that decoding reads per token: all weights, with one row of the position embedding."""
    weights = bridge.num_parameters(config) - (config.n_positions - 1) * config.n_embd
    return weights * (2 if dtype == "bfloat16" else 4)


def matmul_rate(dtype: str) -> tuple[float, str]:
    """Rate of matrix products in FLOP/s, and the source of the figure.

    The figure comes from the data sheet for bfloat16 on known GPUs and TPUs. Otherwise, the rate is measured with
    2048 x 2048 matrices.
    """
    from gpt2_jax import hardware

    hardware.measured_peak_flops.cache_clear()
    return hardware.peak_flops(dtype)


def read_rate() -> tuple[float, str]:
    """Rate at which the device reads an array of `READ_BYTES`, in bytes/s, and the source of the figure.

    On CPU, all cores read.
    """
    import jax
    import jax.numpy as jnp

    count = READ_BYTES // 4
    if jax.default_backend() == "cpu":  # numpy's maximum reads faster than any XLA reduction
        threads = available_cores()
        parts = np.array_split(np.ones(count, np.float32), threads)
        with ThreadPoolExecutor(threads) as pool:
            return _best_rate(lambda: list(pool.map(np.max, parts))), f"measured on {threads} cores"
    array, total = jnp.ones(count, jnp.float32), jax.jit(jnp.sum)
    return _best_rate(lambda: total(array).block_until_ready()), f"measured on {jax.devices()[0].device_kind}"


def _best_rate(read: Callable[[], Any]) -> float:
    def seconds() -> float:
        began = time.perf_counter()
        read()
        return time.perf_counter() - began

    seconds()  # warm up
    return READ_BYTES / min(seconds() for _ in range(READ_REPEATS))


def available_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# The interface of a worker; see `worker.py`.


def import_packages(name: str) -> None:
    import jax  # noqa: F401


def prepare(job: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The action measures the rate that `job["task"]` names, and returns it with its source."""
    rate = {"flops": lambda: matmul_rate(job["dtype"]), "bytes": read_rate}[job["task"]]
    return rate, lambda: None


def device_info() -> dict[str, Any]:
    import jax

    return {"device": jax.devices()[0].device_kind, "device_peak_bytes": None}

"""What no implementation can be faster than: the arithmetic and the bytes that a task needs, and what the device gives.

The rates are measured in a process of their own, between the turns of those that are compared, so that a machine
that becomes slower is seen.
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
"""Read at a time: more than the caches of most machines hold."""
READINGS = 5


def needed_flops(task: str, config: GPT2Config, batch: int, length: int) -> float:
    """FLOPs that one training step, or one forward pass, cannot do without.

    Two for each weight of a product and token, the head's included and the position embedding's not, and 2 D T of
    each layer's attention, whose two products see half of the T x T pairs; the backward pass has two products for
    each of the forward's. So 6 N + 6 L D T a token to train. What remat computes again is not needed.
    """
    D, L = config.n_embd, config.n_layer
    weights = L * (4 * D**2 + 2 * D * config.feed_forward_size) + config.vocab_size * D
    forward = batch * length * (2 * weights + 2 * L * D * length)
    return {"train": 3.0, "forward": 1.0}[task] * forward


def needed_bytes(config: GPT2Config, dtype: str) -> int:
    """Bytes that are read for one more token: all weights once, but of the position embedding only a row."""
    weights = bridge.num_parameters(config) - (config.n_positions - 1) * config.n_embd
    return weights * (2 if dtype == "bfloat16" else 4)


def matrix_products(dtype: str) -> tuple[float, str]:
    """FLOP/s in products of 2048 x 2048 matrices, measured now, and where the figure is from.

    For a GPU or TPU that is known, in bfloat16, the data sheet's.
    """
    from gpt2_jax import hardware

    hardware.measured_peak_flops.cache_clear()
    return hardware.peak_flops(dtype)


def reading() -> tuple[float, str]:
    """Bytes a second at which the device, or all cores, read an array of `READ_BYTES`, and where that is from."""
    import jax
    import jax.numpy as jnp

    count = READ_BYTES // 4
    if jax.default_backend() == "cpu":  # numpy's maximum reads faster here than any reduction of XLA's
        threads = cores()
        parts = np.array_split(np.ones(count, np.float32), threads)
        with ThreadPoolExecutor(threads) as pool:
            return _fastest(lambda: list(pool.map(np.max, parts))), f"measured on {threads} cores"
    array, total = jnp.ones(count, jnp.float32), jax.jit(jnp.sum)
    return _fastest(lambda: total(array).block_until_ready()), f"measured on {jax.devices()[0].device_kind}"


def _fastest(read: Callable[[], Any]) -> float:
    def seconds() -> float:
        began = time.perf_counter()
        read()
        return time.perf_counter() - began

    seconds()
    return READ_BYTES / min(seconds() for _ in range(READINGS))


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# As a worker, see `worker.py`.


def imports(name: str) -> None:
    import jax  # noqa: F401


def prepare(job: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The rate, in units of the task's work a second."""
    rate = {"flops": lambda: matrix_products(job["dtype"]), "bytes": reading}[job["task"]]
    return rate, lambda: None


def about() -> dict[str, Any]:
    import jax

    return {"device": jax.devices()[0].device_kind, "device_peak_bytes": None}

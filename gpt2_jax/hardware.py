"""How much arithmetic a step is, and how much the device could do."""

from __future__ import annotations

import time
from functools import cache

import jax
import jax.numpy as jnp

import bridge
from bridge import GPT2Config

# Dense matrix products in bfloat16, in FLOP/s per device, from the makers' data sheets. The first name that a
# device's has in it counts, so the longer stand before the shorter.
_BFLOAT16_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "TPU v6": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # as JAX calls v5p
    "TPU v4": 275e12,
}


def flops_per_token(config: GPT2Config, length: int) -> float:
    """Of one training step, forward and backward, without what remat computes again.

    6 N + 12 L D T, where N counts every parameter but the position embedding: Chowdhery et al. 2022 (PaLM),
    appendix B, as nanoGPT and others report it. Causality is not subtracted.
    """
    weights = bridge.num_parameters(config) - config.n_positions * config.n_embd
    return 6 * weights + 12 * config.n_layer * config.n_embd * length


def peak_flops(dtype: str) -> tuple[float, str]:
    """FLOP/s of the first device in matrix products, and where the figure is from.

    Known for bfloat16 on the devices of the table; measured otherwise, with a product of 2048 x 2048 matrices.
    """
    device = jax.devices()[0]
    known = next((peak for name, peak in _BFLOAT16_PEAKS.items() if name in device.device_kind), None)
    if dtype == "bfloat16" and known is not None:
        return known, f"{device.device_kind} data sheet"
    return _measured_peak(dtype), f"measured on {device.device_kind}"


@cache
def _measured_peak(dtype: str, size: int = 2048, repeats: int = 8) -> float:
    square = jnp.ones((size, size), dtype)
    multiply = jax.jit(jnp.matmul)
    multiply(square, square).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        multiply(square, square).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best

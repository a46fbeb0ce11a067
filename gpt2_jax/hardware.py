"""FLOPs of a training step, and the rates of accelerators: data sheet figures and measurements."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp

import bridge
from bridge import GPT2Config

GIB = 2**30


@dataclass(frozen=True)
class TpuChip:
    """Data sheet figures of a TPU chip. Rates are per second and chip; link and network rates are for one direction."""

    name: str
    """The name used in topologies, such as `v5e`."""
    device_kinds: tuple[str, ...]
    """Substrings of `jax.Device.device_kind` that identify the chip. JAX calls v5p "TPU v5"."""
    flops: float
    """Peak of dense bfloat16 matrix products, in FLOP/s."""
    hbm_bytes: int
    """Size of the memory."""
    hbm_available: int
    """Bytes available to a program, as stated in libtpu 0.0.42's out-of-memory error."""
    hbm_bandwidth: float
    link_bandwidth: float
    """Bandwidth of one link to a neighbouring chip."""
    links: int
    """Number of links."""
    network_bandwidth: float
    """Bandwidth between slices: this chip's share of its host's network."""
    sizes: Mapping[int, str]
    """Number of chips -> topology, for weak scaling."""


_2D = {1: "1x1", 4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"}
_3D = {1: "1x1x1", 4: "2x2x1", 16: "2x2x4", 64: "4x4x4", 256: "4x8x8"}

# Sources:
# - FLOP/s, HBM size and bandwidth: cloud.google.com/tpu/docs, the pages v4, v5e, v5p and v6e.
# - Link bandwidth: the measured rather than the signalling rate, from "How to Scale Your Model" (Austin et al. 2025),
#   part 2.
# - Network bandwidth: the same documentation, for a pod (v5e 6.4 Tbit/s and v6e 25.6 Tbit/s over 256 chips) or a chip
#   (v5p 50 Gbit/s). For v4, the book gives the same figure as for v5p.
_TPU_CHIPS = (
    TpuChip("v4", ("TPU v4",), 275e12, 32 * GIB, int(30.75 * GIB), 1228e9, 45e9, 6, 6.25e9, _3D),
    TpuChip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, int(15.75 * GIB), 819e9, 45e9, 4, 3.125e9, _2D),
    TpuChip("v5p", ("TPU v5",), 459e12, 95 * GIB, int(95.74 * GIB), 2765e9, 90e9, 6, 6.25e9, _3D),
    TpuChip("v6e", ("TPU v6",), 918e12, 32 * GIB, int(31.25 * GIB), 1640e9, 90e9, 4, 12.5e9, _2D),
)
TPU_CHIPS: Mapping[str, TpuChip] = {chip.name: chip for chip in _TPU_CHIPS}
"""Name -> chip."""

_GPU_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
}
"""Peak of dense bfloat16 matrix products in FLOP/s, from NVIDIA's data sheets."""

# The first key that is a substring of the device kind applies, so longer names precede their prefixes.
_BFLOAT16_PEAKS = {**_GPU_PEAKS, **{kind: chip.flops for chip in _TPU_CHIPS for kind in chip.device_kinds}}


def flops_per_token(config: GPT2Config, length: int, trained: float = 1.0) -> float:
    """FLOPs of one training step per token, forward and backward, excluding recomputation.

    6 N + 12 L D T, where N counts every parameter except the position embedding. Causality is not subtracted.
    Source: Chowdhery et al. 2022 (PaLM), appendix B; nanoGPT reports the same figure.

    Args:
        trained: the fraction of the weights that have gradients. Those of all weights take 2 N of the 6 N FLOPs.

    >>> f"{flops_per_token(bridge.GPT2_SIZES['gpt2'], 1024):.3g}"
    '8.55e+08'
    """
    weights = bridge.num_parameters(config) - config.n_positions * config.n_embd
    return (4 + 2 * trained) * weights + 12 * config.n_layer * config.n_embd * length


def peak_flops(dtype: str) -> tuple[float, str]:
    """Peak of matrix products on the first device, in FLOP/s, and the source of the figure.

    The figure comes from the data sheet for bfloat16 on known GPUs and TPUs; otherwise it is measured.
    """
    device = jax.devices()[0]
    known = next((peak for kind, peak in _BFLOAT16_PEAKS.items() if kind in device.device_kind), None)
    if dtype == "bfloat16" and known is not None:
        return known, f"{device.device_kind} data sheet"
    return measured_peak_flops(dtype), f"measured on {device.device_kind}"


@cache
def measured_peak_flops(dtype: str, size: int = 2048, repeats: int = 8) -> float:
    """FLOP/s of the fastest of `repeats` products of [size, size] matrices. Call `cache_clear()` to measure again."""
    square = jnp.ones((size, size), dtype)
    multiply = jax.jit(jnp.matmul)
    multiply(square, square).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        multiply(square, square).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best

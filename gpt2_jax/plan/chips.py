"""What a TPU chip can do, by the makers' figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Rates are per second and chip; a link's and the network's are of one direction."""

    name: str
    """As topologies are named."""
    flops: float
    """Matrix products in bfloat16."""
    hbm_bytes: int
    """What is built in."""
    hbm_available: int
    """What the compiler gives a program, by its own message where one is too large (libtpu 0.0.42)."""
    hbm_bandwidth: float
    link_bandwidth: float
    links: int
    network_bandwidth: float
    """Between slices: the hosts' share for one chip."""
    sizes: Mapping[int, str]
    """Chips -> topology, for weak scaling."""


_FLAT = {1: "1x1", 4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"}
_CUBES = {1: "1x1x1", 4: "2x2x1", 16: "2x2x4", 64: "4x4x4", 256: "4x8x8"}

# FLOP/s, memory and its rate: cloud.google.com/tpu/docs, the pages v4, v5e, v5p and v6e. A link's rate: what is
# measured rather than what is signalled, "How to Scale Your Model" (Austin et al. 2025), part 2. The network's: the
# same pages, a pod's (v5e 6.4 Tbit/s and v6e 25.6 Tbit/s over 256 chips) or a chip's (v5p 50 Gbit/s; v4 as v5p, by
# the book).
CHIPS = (
    Chip("v4", 275e12, 32 * GIB, int(30.75 * GIB), 1228e9, 45e9, 6, 6.25e9, _CUBES),
    Chip("v5e", 197e12, 16 * GIB, int(15.75 * GIB), 819e9, 45e9, 4, 3.125e9, _FLAT),
    Chip("v5p", 459e12, 95 * GIB, int(95.74 * GIB), 2765e9, 90e9, 6, 6.25e9, _CUBES),
    Chip("v6e", 918e12, 32 * GIB, int(31.25 * GIB), 1640e9, 90e9, 4, 12.5e9, _FLAT),
)
BY_NAME = {chip.name: chip for chip in CHIPS}

"""Two numbers for each gradient: its L2 norm, and its dot product with fixed random signs.

They detect a changed gradient without storing it. A change d of the gradient changes the dot product by about ||d||:
its variance over random signs is ||d||^2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

_CHUNK = 2**20
"""Elements that are summed at a time; a multiple of 64."""


def gradient_sketch(gradients: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return [N, 2] in float64: norm and dot product of each gradient, sorted by name.

    Args:
        gradients: canonical name -> gradient in the canonical shape.
    """
    return np.array([_norm_and_projection(name, gradients[name]) for name in sorted(gradients)])


def _norm_and_projection(name: str, gradient: np.ndarray) -> tuple[float, float]:
    values = gradient.reshape(-1).astype(np.float64, copy=False)
    # numpy guarantees that the raw numbers of a bit generator never change. Numbers of a distribution may (NEP 19).
    bits = np.random.Philox(key=int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little"))
    projection = 0.0
    for start in range(0, len(values), _CHUNK):
        chunk = values[start : start + _CHUNK]
        raw = np.asarray(bits.random_raw(-(-len(chunk) // 64)), "<u8")
        is_positive = np.unpackbits(raw.view(np.uint8), count=len(chunk), bitorder="little").view(bool)
        projection += float(np.where(is_positive, chunk, -chunk).sum())
    return float(np.linalg.norm(values)), projection

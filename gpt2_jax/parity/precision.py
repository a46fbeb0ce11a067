"""The precision in which JAX computes within a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def full_precision(dtype: str, precision: str = "highest", x64: bool = True) -> Iterator[None]:
    """Set the precision of matrix products, and enable float64. float64 runs on the CPU.

    GPUs and TPUs by default round float32 operands of matrix products to a narrower format.

    Args:
        x64: whether arrays that a model creates without a dtype are float64.
    """
    device = jax.devices("cpu")[0] if dtype == "float64" else None
    with jax.enable_x64(x64), jax.default_matmul_precision(precision), jax.default_device(device):
        yield

"""The dtype of sums."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array


def wide_dtype(x: Array) -> jnp.dtype:
    """Return the dtype for sums over `x`: its own dtype, but at least float32."""
    return jnp.promote_types(x.dtype, jnp.float32)

"""Sizes of arrays, which may be symbolic dimensions of `jax.export`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax


def known_size(shape: Sequence[Any]) -> int | None:
    """Return the product of the dimensions, or None if one of them is a symbolic dimension of `jax.export`.

    >>> known_size((3, 4))
    12
    """
    size = math.prod(shape)
    return size if isinstance(size, int) else None


def exceeds(size: Any, limit: int) -> bool:
    """Return whether a dimension is larger than the limit.

    Raises `ValueError` for a symbolic dimension of `jax.export` whose constraints do not decide it.
    """
    try:
        return bool(size > limit)
    except jax.errors.InconclusiveDimensionOperation as error:
        constraint = f"constraints=['{size} <= {limit}']"
        raise ValueError(f"the size {size} is symbolic; pass {constraint} to jax.export.symbolic_shape") from error

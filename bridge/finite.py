"""Values that are no numbers: found by their bits, the same way in every float type."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

# An exponent of all ones is infinity or NaN (IEEE 754, and bfloat16 as float32's upper half).
_EXPONENTS: Mapping[np.dtype, int] = {
    np.dtype(np.float64): 0x7FF0_0000_0000_0000,
    np.dtype(np.float32): 0x7F80_0000,
    np.dtype(np.float16): 0x7C00,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
}
_BLOCK = 2**20
"""Values looked at together: no second array of the tensor's size is made."""


def count_not_finite(array: np.ndarray) -> int:
    """How many values are NaN or infinite."""
    bits = array.reshape(-1).view(f"u{array.dtype.itemsize}")
    exponent = bits.dtype.type(_EXPONENTS[array.dtype])
    return sum(
        int(np.count_nonzero((bits[start : start + _BLOCK] & exponent) == exponent))
        for start in range(0, bits.size, _BLOCK)
    )

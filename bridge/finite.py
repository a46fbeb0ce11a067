"""Find NaN and infinite values by their bits, in the same way for every float type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import ml_dtypes
import numpy as np

from bridge.errors import ConversionError
from bridge.storage.dtypes import FLOAT_DTYPES
from bridge.storage.tensors import LazyTensor, LazyTensorMap

# If all exponent bits are set, the value is infinite or NaN (IEEE 754; bfloat16 is the upper half of float32).
_EXPONENTS: Mapping[np.dtype, int] = {
    np.dtype(np.float64): 0x7FF0_0000_0000_0000,
    np.dtype(np.float32): 0x7F80_0000,
    np.dtype(np.float16): 0x7C00,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
}
_BLOCK = 2**20
"""Number of values tested at a time. Testing in blocks avoids a second array of the tensor's size."""


def count_not_finite(array: np.ndarray) -> int:
    """Return the number of values that are NaN or infinite."""
    bits = array.reshape(-1).view(f"u{array.dtype.itemsize}")
    exponent = bits.dtype.type(_EXPONENTS[array.dtype])
    return sum(
        int(np.count_nonzero((bits[start : start + _BLOCK] & exponent) == exponent))
        for start in range(0, bits.size, _BLOCK)
    )


def rejecting_non_finite(tensors: LazyTensorMap, what: str = "") -> LazyTensorMap:
    """Return the tensors, each of which raises a `ConversionError` when it is read and has NaN or infinity.

    Args:
        what: what the tensors are, for the message. It stands before the name.
    """

    def checked(name: str, entry: LazyTensor) -> LazyTensor:
        def read() -> np.ndarray:
            array = entry.read()
            if array.dtype in FLOAT_DTYPES and (bad := count_not_finite(array)):
                raise ConversionError(
                    f"{what}{name} has {bad} values that are not finite; the checkpoint is damaged, or its training "
                    "diverged (--allow-non-finite, or allow_non_finite=True, writes them as they are)"
                )
            return array

        return replace(entry, read=read)

    return LazyTensorMap({name: checked(name, entry) for name, entry in tensors.entries.items()})

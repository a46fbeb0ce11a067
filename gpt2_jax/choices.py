"""Values of configuration fields, and the arrays that they support. Imports no JAX: `gpt2 VERB --help` stays quick."""

from __future__ import annotations

from typing import Literal, get_args

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

Remat = Literal["none", "dots", "full"]
"""The activations of a layer that are kept for the backward pass; the others are recomputed.

none: keep all that the derivatives need. dots: keep outputs of matmuls and attention, and recompute norms and
activations, which is faster on CPU than writing and reading them. full: keep only the input of each layer.
"""

Implementation = Literal["auto", "xla", "blockwise", "cudnn", "splash"]
"""The implementations of attention (`gpt2_jax.ops.attention`)."""

SPLASH_BLOCKS = (512, 256, 128)
"""Block sizes of the TPU kernel. The largest that divides the length is used."""

_BFLOAT16, _FLOAT16, _FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)


def obstacle(
    implementation: str, dtype: DTypeLike, length: int, head_size: int, *, has_segments: bool = False
) -> str | None:
    """Return why an implementation does not support these arrays, as a phrase for a message, or None if it does.

    Args:
        has_segments: whether there are `segment_ids`.
    """
    dtype = np.dtype(dtype)
    if implementation not in get_args(Implementation):
        return f"is not one of {', '.join(get_args(Implementation))}"
    if implementation == "cudnn" and dtype not in (_BFLOAT16, _FLOAT16):
        return f"takes bfloat16 and float16, not {dtype.name}"
    if implementation == "cudnn" and (head_size % 8 or head_size > 128):
        return f"takes head sizes that are multiples of 8 up to 128, not {head_size}"
    if implementation == "cudnn" and has_segments:
        return "does not support segment_ids, which packed documents have"
    if implementation == "splash" and length % min(SPLASH_BLOCKS):
        return f"takes lengths that are multiples of {min(SPLASH_BLOCKS)}, not {length}"
    if implementation == "splash" and dtype not in (_BFLOAT16, _FLOAT32):
        return f"takes bfloat16 and float32, not {dtype.name}"
    return None

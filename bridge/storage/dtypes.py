"""The element types of stored tensors, and their names in each file format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class ElementType:
    """An element type; None where a format has no name for it."""

    dtype: np.dtype
    safetensors: str
    """The `dtype` in a header of safetensors. ggml has the same names for the types that this project reads."""
    torch: str | None = None
    """The storage class in a pickle of torch."""
    tensorflow: int | None = None
    """The number in tensorflow/core/framework/types.proto."""

    @property
    def name(self) -> str:
        """The name in numpy, Flax's msgpack and zarr."""
        return self.dtype.name


ELEMENT_TYPES = (
    ElementType(np.dtype(np.float32), "F32", "FloatStorage", 1),
    ElementType(np.dtype(np.float16), "F16", "HalfStorage", 19),
    ElementType(np.dtype(ml_dtypes.bfloat16), "BF16", "BFloat16Storage", 14),
    ElementType(np.dtype(np.float64), "F64", "DoubleStorage", 2),
    ElementType(np.dtype(np.int64), "I64", "LongStorage", 9),
    ElementType(np.dtype(np.int32), "I32", "IntStorage", 3),
    ElementType(np.dtype(np.int16), "I16", "ShortStorage", 5),
    ElementType(np.dtype(np.int8), "I8", "CharStorage", 6),
    ElementType(np.dtype(np.uint64), "U64"),
    ElementType(np.dtype(np.uint32), "U32"),
    ElementType(np.dtype(np.uint16), "U16"),
    ElementType(np.dtype(np.uint8), "U8", "ByteStorage", 4),
    ElementType(np.dtype(np.bool_), "BOOL", "BoolStorage", 10),
)
"""All types that are read. Weights must be of a float type; old checkpoints also have mask buffers of other types."""

DTYPES: Mapping[str, np.dtype] = {t.name: t.dtype for t in ELEMENT_TYPES}
"""numpy's name -> dtype."""
SAFETENSORS_DTYPES: Mapping[str, np.dtype] = {t.safetensors: t.dtype for t in ELEMENT_TYPES}
TORCH_STORAGES: Mapping[str, np.dtype] = {t.torch: t.dtype for t in ELEMENT_TYPES if t.torch is not None}
TENSORFLOW_DTYPES: Mapping[int, np.dtype] = {t.tensorflow: t.dtype for t in ELEMENT_TYPES if t.tensorflow is not None}

FLOAT_DTYPES = tuple(DTYPES[name] for name in ("float32", "float16", "bfloat16", "float64"))
"""The types of weights. Conversion keeps every bit of them."""

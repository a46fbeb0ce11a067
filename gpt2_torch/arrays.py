"""Between torch tensors and the bridge's numpy arrays, bit for bit, bfloat16 included."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from bridge.storage.tensors import contiguous


def tensor_from_array(array: np.ndarray) -> Tensor:
    """The same numbers as a tensor, row by row, shared where the array is so and can be written to."""
    array = contiguous(array) if array.flags.writeable else array.copy()
    if array.dtype == ml_dtypes.bfloat16:  # numpy has no bfloat16 of its own; int16 carries the bits
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array_from_tensor(tensor: Tensor) -> np.ndarray:
    """The same bytes as an array, shared where the tensor is on the CPU."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()

"""Tensors with random values, and conversion to and from numpy arrays, bit for bit, including bfloat16."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from bridge.storage.tensors import contiguous


def tensor_from_array(array: np.ndarray) -> Tensor:
    """Return the array as a contiguous tensor. Shares memory if the array is contiguous and writable."""
    array = contiguous(array) if array.flags.writeable else array.copy()
    if array.dtype == ml_dtypes.bfloat16:  # torch.from_numpy does not take ml_dtypes; int16 carries the bits
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array_from_tensor(tensor: Tensor) -> np.ndarray:
    """Return the tensor as an array. Shares memory if the tensor is on the CPU."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def normal_tensor(*shape: int, std: float) -> Tensor:
    """Return normally distributed values with mean 0, or a tensor without values on the device `meta`."""
    tensor = torch.empty(shape)
    # On the device `meta`, `normal_` would import torch._dynamo, which takes longer than it takes to load GPT-2.
    return tensor if tensor.is_meta else tensor.normal_(std=std)

"""Between torch tensors and the bridge's numpy arrays, bit for bit, bfloat16 included."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from bridge import Checkpoint
from gpt2_torch.model import GPT2


def tensor_from_array(array: np.ndarray) -> Tensor:
    """The same bytes as a tensor, shared where the array can be written to."""
    array = array if array.flags.writeable else array.copy()
    if array.dtype == ml_dtypes.bfloat16:  # numpy has no bfloat16 of its own; int16 carries the bits
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array_from_tensor(tensor: Tensor) -> np.ndarray:
    """The same bytes as an array, shared where the tensor is on the CPU."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def model_from_checkpoint(checkpoint: Checkpoint) -> GPT2:
    """A model around the checkpoint's tensors, in their dtypes and in eval mode."""
    with torch.device("meta"):  # no memory, no initialisation: the tensors are given next
        model = GPT2(checkpoint.config)
    state = {name: tensor_from_array(array) for name, array in checkpoint.tensors.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def checkpoint_from_model(model: GPT2) -> Checkpoint:
    """The model as a checkpoint that `bridge.save` writes; shares the model's memory."""
    state = {name: array_from_tensor(tensor) for name, tensor in model.state_dict().items()}
    return Checkpoint.of(state, model.config)

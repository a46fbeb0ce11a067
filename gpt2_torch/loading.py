"""From a checkpoint to a model, and back to a checkpoint."""

from __future__ import annotations

import torch

from bridge import Checkpoint
from gpt2_torch.arrays import array_from_tensor, tensor_from_array
from gpt2_torch.model import GPT2


def model_from_checkpoint(checkpoint: Checkpoint) -> GPT2:
    """A model around the checkpoint's tensors, in their dtypes and in eval mode."""
    with torch.device("meta"):  # no memory, no initialisation: the tensors are given next
        model = GPT2(checkpoint.config)
    state = {name: tensor_from_array(array) for name, array in checkpoint.tensors.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def checkpoint_from_model(model: GPT2, like: Checkpoint | None = None) -> Checkpoint:
    """The model as a checkpoint that `bridge.save` writes; shares the model's memory.

    `like`: the checkpoint that it was made from, whose tokenizer and harmless fields go along.
    """
    state = {name: array_from_tensor(tensor) for name, tensor in model.state_dict().items()}
    return Checkpoint.of(state, model.config, like)

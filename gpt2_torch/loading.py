"""Conversion of a checkpoint to a model, and of a model to a checkpoint."""

from __future__ import annotations

from pathlib import Path

from bridge import Checkpoint
from gpt2_torch.arrays import array_from_tensor
from gpt2_torch.model import GPT2


def from_pretrained(
    source: str | Path,
    *,
    activation: str | None = None,
    drop_extra_heads: bool = False,
    base: str | Path | None = None,
) -> GPT2:
    """Load a model from a checkpoint in any format or from a Hugging Face id, in its dtype and in eval mode.

    Args:
        activation: the activation of a nanoGPT file that does not state it; see `bridge.load`.
        drop_extra_heads: leave out the tensors of heads for other tasks. By default they are an error.
        base: for a LoRA adapter: the model that it changes, as a path or a Hugging Face id.

    Raises `bridge.BridgeError` for anything that is not a GPT-2 checkpoint.
    """
    return GPT2.from_pretrained(source, activation=activation, drop_extra_heads=drop_extra_heads, base=base)


def model_from_checkpoint(checkpoint: Checkpoint) -> GPT2:
    """Return a model with the checkpoint's tensors, in their dtypes and in eval mode."""
    return GPT2.from_checkpoint(checkpoint)


def checkpoint_from_model(model: GPT2, like: Checkpoint | None = None) -> Checkpoint:
    """Return the model as a checkpoint, which `bridge.save` writes. It shares the model's memory.

    Args:
        like: the checkpoint that the model was made from. Its tokenizer and unused fields are kept.
    """
    state = {name: array_from_tensor(tensor) for name, tensor in model.state_dict().items()}
    return Checkpoint.of(state, model.config, like)

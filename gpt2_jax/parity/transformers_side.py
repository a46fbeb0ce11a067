"""What the GPT2LMHeadModel of transformers computes from a checkpoint: logits and gradients."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch

from bridge import Checkpoint
from gpt2_torch.arrays import tensor_from_array
from gpt2_torch.ops.cross_entropy import next_token_loss

NAME = "transformers"


def is_installed() -> bool:
    return importlib.util.find_spec("transformers") is not None


def logits(checkpoint: Checkpoint, ids: np.ndarray, dtype: str) -> np.ndarray:
    """Logits [B, T, V] in float64, computed in `dtype`."""
    with torch.inference_mode():
        return _model(checkpoint, dtype)(torch.from_numpy(ids)).logits.double().numpy()


def gradients(checkpoint: Checkpoint, ids: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """Gradients of the next-token loss by canonical parameter name, computed in `dtype`."""
    model, tokens = _model(checkpoint, dtype), torch.from_numpy(ids)
    next_token_loss(model(tokens).logits, tokens).backward()
    return {name.removeprefix("transformer."): p.grad.numpy() for name, p in model.named_parameters()}


def _model(checkpoint: Checkpoint, dtype: str) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    # Eager attention, because the fused implementations ignore reorder_and_upcast_attn. In float64 this option is
    # off, because transformers' "upcast" converts to float32.
    fields = {**checkpoint.config.to_hf(), "attn_implementation": "eager", "bos_token_id": None, "eos_token_id": None}
    if dtype == "float64":
        fields["reorder_and_upcast_attn"] = False
    config = GPT2Config(**fields)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    state = {f"transformer.{name}": tensor_from_array(array) for name, array in checkpoint.tensors.items()}
    head = "transformer.lm_head.weight"
    state["lm_head.weight"] = state.pop(head) if head in state else state["transformer.wte.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model.to(getattr(torch, dtype)).eval()

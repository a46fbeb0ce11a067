"""What `gpt2_torch` computes from a checkpoint. `jax_gpt2` has the same functions.

All functions take and return numpy arrays and keep no model afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bridge import Checkpoint, GenerationConfig, SequenceClassifier
from gpt2_jax.parity.activations import (
    LOGITS,
    Activations,
    Outputs,
    is_recorded_output,
    layer_outputs,
    next_labels,
    recorded_input,
)
from gpt2_jax.parity.inputs import AdamW
from gpt2_torch import GPT2, Decoder, model_from_checkpoint, model_from_classifier
from gpt2_torch.arrays import array_from_tensor
from gpt2_torch.ops.cross_entropy import cross_entropy, next_token_loss

NAME = "gpt2_torch"


def logits(checkpoint: Checkpoint, ids: np.ndarray, mask: np.ndarray | None, dtype: str) -> np.ndarray:
    """Logits [B, T, V] in float64, computed in `dtype`."""
    with torch.inference_mode():
        return _model(checkpoint, dtype)(_tensor(ids), _tensor(mask)).double().numpy()


def activations(checkpoint: Checkpoint, ids: np.ndarray, mask: np.ndarray | None) -> Activations:
    """All compared activations of a forward pass, computed in float64."""
    model = _model(checkpoint, "float64")
    values: Activations = {}

    def record_input(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            values[name] = args[0].numpy()

        return hook

    def record_output(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            values[name] = np.stack([x.numpy() for x in output]) if isinstance(output, tuple) else output.numpy()

        return hook

    for module_name, module in model.named_modules():
        if name := recorded_input(module_name):
            module.register_forward_pre_hook(record_input(name))
        if is_recorded_output(module_name):
            module.register_forward_hook(record_output(module_name))
    with torch.inference_mode():
        values[LOGITS] = model(_tensor(ids), _tensor(mask)).numpy()
    return values


def outputs(
    checkpoint: Checkpoint, ids: np.ndarray, mask: np.ndarray | None, positions: np.ndarray, dtype: str
) -> Outputs:
    """Hidden states, logits and losses in float64, computed in `dtype`, one row at a time."""
    names, model = layer_outputs(checkpoint.config.n_layer), _model(checkpoint, dtype)
    layers: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            layers[name] = output[:, positions]

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(record(name))
    rows = []
    for i in range(len(ids)):
        row, row_mask = ids[i : i + 1], None if mask is None else mask[i : i + 1]
        with torch.inference_mode():
            logits = model(_tensor(row), _tensor(row_mask))
            losses = cross_entropy(logits[:, :-1], _tensor(next_labels(row, row_mask)))
        states = torch.stack([layers[name] for name in names], dim=2)
        rows.append([value.double().numpy() for value in (states, logits[:, positions], losses)])
    return Outputs(*map(np.concatenate, zip(*rows, strict=True)))


def gradients(checkpoint: Checkpoint, ids: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """Gradients of the next-token loss by canonical parameter name, computed in `dtype`."""
    model = _model(checkpoint, dtype)
    next_token_loss(model(_tensor(ids)), _tensor(ids)).backward()
    return {name: _gradient(name, p) for name, p in model.named_parameters()}


def train(
    checkpoint: Checkpoint, batches: np.ndarray, dtype: str, adamw: AdamW
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Train one step per batch. Returns the loss before each step, and the final weights."""
    model = _model(checkpoint, dtype)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=adamw.learning_rate,
        betas=(adamw.beta1, adamw.beta2),
        eps=adamw.epsilon,
        weight_decay=adamw.weight_decay,
    )
    losses = []
    for ids in batches:
        optimizer.zero_grad()
        loss = next_token_loss(model(_tensor(ids)), _tensor(ids))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: array_from_tensor(tensor) for name, tensor in model.state_dict().items()}


def generate(checkpoint: Checkpoint, prompts: np.ndarray, config: GenerationConfig) -> list[list[int]]:
    """The new ids for prompts [B, T], computed in float64. `config` asks for one output for each prompt."""
    outputs = Decoder(_model(checkpoint, "float64")).generate(prompts.tolist(), config)
    return [output.ids for [output] in outputs]


def class_logits(classifier: SequenceClassifier, ids: np.ndarray, dtype: str) -> np.ndarray:
    """Logits of the classes [B, C] in float64, computed in `dtype`."""
    model = model_from_classifier(classifier).to(getattr(torch, dtype))
    with torch.inference_mode():
        return model(_tensor(ids)).double().numpy()


def _gradient(name: str, parameter: torch.nn.Parameter) -> np.ndarray:
    if parameter.grad is None:
        raise AssertionError(f"the PyTorch model does not use {name}")
    return parameter.grad.numpy()


def _model(checkpoint: Checkpoint, dtype: str) -> GPT2:
    return model_from_checkpoint(checkpoint).to(getattr(torch, dtype))


def _tensor(array: Any) -> Any:
    return None if array is None else torch.from_numpy(np.asarray(array, np.int64))

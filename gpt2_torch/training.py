"""Training of the reference model: AdamW with nanoGPT's weight decay, its schedules, and the training step.

Results match those of `gpt2_jax.training`, except for dropout, because each framework has its own random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

import bridge
from bridge import IGNORE_INDEX, BridgeError, ConversionError, optimizer_state
from bridge.optimizer_state import AdamWState
from gpt2_torch.arrays import array_from_tensor, tensor_from_array
from gpt2_torch.loss import summed_loss
from gpt2_torch.model import GPT2

Batch = Mapping[str, Tensor]
"""`input_ids` [B, T]; `labels` [B, T], the token after each position, or `IGNORE_INDEX`; and optionally
`attention_mask`, `segment_ids` and `position_ids` [B, T], as in the model's call."""


def adamw(
    model: GPT2,
    *,
    learning_rate: float = 6e-4,
    beta1: float = 0.9,
    beta2: float = 0.95,
    epsilon: float = 1e-8,
    weight_decay: float = 0.1,
) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter 2019) with two groups: parameters with weight decay, and those without.

    `decays` in the table `bridge.parameters` selects the group. Within a group, parameters have the order of
    `model.state_dict()`; `parameter_names` returns their names.
    """
    own = dict(model.named_parameters())
    decaying, others = (
        [own[p.torch_name] for p in bridge.parameters(model.config) if p.decays is decays] for decays in (True, False)
    )
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), eps=epsilon)


def learning_rate_at(
    step: int,
    *,
    max_steps: int,
    learning_rate: float,
    min_learning_rate: float,
    schedule: Literal["cosine", "wsd", "constant"] = "cosine",
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    decay_fraction: float = 0.2,
) -> float:
    """Return the learning rate of a step, counted from 0. `gpt2_jax.training.config` documents the arguments.

    Warm-up and cosine are those of nanoGPT's `get_lr`.
    """
    if step < warmup_steps:
        return learning_rate * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return learning_rate
    if schedule == "cosine":
        begin, end = warmup_steps, max_steps if decay_steps is None else decay_steps
    else:
        begin, end = max(warmup_steps, max_steps - round(decay_fraction * max_steps)), max_steps
    progress = min(max((step - begin) / max(1, end - begin), 0.0), 1.0)
    if schedule == "cosine":
        progress = 0.5 * (1.0 - math.cos(math.pi * progress))
    return learning_rate + progress * (min_learning_rate - learning_rate)


def train_step(
    model: GPT2,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    learning_rate: float,
    max_grad_norm: float | None = 1.0,
    num_microbatches: int = 1,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Update `model` once, in training mode. Returns the loss, in nats, and the gradient norm before clipping.

    The loss is the mean over all labels of the batch that are not ignored. With `num_microbatches`, each microbatch is
    weighted by its number of such labels, so the loss is the same.

    Raises `bridge.BridgeError` if `num_microbatches` does not divide the batch.
    """
    rows = len(batch["input_ids"])
    if num_microbatches < 1 or rows % num_microbatches:
        raise BridgeError(
            f"a batch of {rows} rows cannot be split into {num_microbatches} equal microbatches; choose a divisor "
            f"of {rows}"
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    model.train()
    optimizer.zero_grad()
    count = (batch["labels"] != IGNORE_INDEX).sum().clamp(min=1)
    losses = []
    for i in range(num_microbatches):
        microbatch = {name: tensor.chunk(num_microbatches)[i] for name, tensor in batch.items()}
        loss = summed_loss(model, microbatch) / count
        loss.backward()
        losses.append(loss.detach())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf if max_grad_norm is None else max_grad_norm)
    optimizer.step()
    return torch.stack(losses).sum(), norm


def parameter_names(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> list[str]:
    """Return the names of the optimizer's parameters, in the order in which its `state_dict()` numbers them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if unknown := [tuple(p.shape) for p in parameters if id(p) not in names]:
        raise ConversionError(f"the optimizer has parameters that are not the model's, of shapes {unknown}")
    return [names[id(parameter)] for parameter in parameters]


def adamw_state(optimizer: torch.optim.Optimizer, model: GPT2) -> AdamWState:
    """Return the optimizer's moments and step count as numpy arrays. Shares memory if the optimizer is on the CPU.

    Raises `bridge.ConversionError` unless the optimizer is an AdamW over all of the model's parameters.
    """
    stored = optimizer.state_dict()  # does not copy the tensors
    entries = {
        key: {what: array_from_tensor(x) if isinstance(x, Tensor) else x for what, x in entry.items()}
        for key, entry in stored["state"].items()
    }
    return optimizer_state.from_torch({**stored, "state": entries}, parameter_names(optimizer, model), model.config)


def load_adamw_state(optimizer: torch.optim.Optimizer, state: AdamWState, model: GPT2) -> None:
    """Copy moments and step count into the optimizer, which keeps its hyperparameters.

    Moments get the dtypes of their parameters.

    Raises `bridge.ConversionError` if the state does not match the model's parameters.
    """
    for moment in (state.exp_avg, state.exp_avg_sq):
        bridge.canonicalize(moment, model.config)  # torch does not check shapes
    groups = optimizer.state_dict()["param_groups"]
    stored = optimizer_state.to_torch(state, parameter_names(optimizer, model), groups)
    entries = {
        key: {what: tensor_from_array(array).clone() for what, array in entry.items()}
        for key, entry in stored["state"].items()
    }
    optimizer.load_state_dict({**stored, "state": entries})

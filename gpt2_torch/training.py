"""Training the reference: AdamW with nanoGPT's rule of decay, its schedules, and one step. The twin of
`gpt2_jax.training`; randomness is torch's own, so the two agree where there is no dropout.
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
from gpt2_torch.model import GPT2
from gpt2_torch.ops.cross_entropy import cross_entropy

Batch = Mapping[str, Tensor]
"""`input_ids` [B, T]; `labels` [B, T], the token after each, `IGNORE_INDEX` where none counts; and where there is
padding `attention_mask` [B, T], 1 for tokens and 0 for padding."""


def adamw(
    model: GPT2,
    *,
    learning_rate: float = 6e-4,
    beta1: float = 0.9,
    beta2: float = 0.95,
    epsilon: float = 1e-8,
    weight_decay: float = 0.1,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over two groups: what decays (`bridge.Parameter.decays`), then what does not.

    Within a group parameters are in the order of `model.state_dict()`; `parameter_names` names them.
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
    """The learning rate of one step, counted from 0; `gpt2_jax.training.config.OptimizerConfig` explains the fields.

    The warm-up and the cosine are nanoGPT's `get_lr`.
    """
    if step < warmup_steps:
        return learning_rate * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return learning_rate
    if schedule == "cosine":
        begin, end = warmup_steps, max_steps if decay_steps is None else decay_steps
    else:
        begin, end = max(warmup_steps, max_steps - round(decay_fraction * max_steps)), max_steps
    fallen = min(max((step - begin) / max(1, end - begin), 0.0), 1.0)
    if schedule == "cosine":
        fallen = 0.5 * (1.0 - math.cos(math.pi * fallen))
    return learning_rate + fallen * (min_learning_rate - learning_rate)


def train_step(
    model: GPT2,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    learning_rate: float,
    max_grad_norm: float | None = 1.0,
    num_microbatches: int = 1,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """One update of `model`, in training mode. Returns the loss, in nats, and the gradient's norm before clipping.

    The loss is the mean over all counted labels of the batch, also where `num_microbatches` runs it in parts: a part
    counts by its labels. Raises `bridge.BridgeError` where the parts cannot be of one size.
    """
    rows = len(batch["input_ids"])
    if num_microbatches < 1 or rows % num_microbatches:
        raise BridgeError(
            f"a batch of {rows} cannot be run in {num_microbatches} equal parts; choose a divisor of {rows}"
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    model.train()
    optimizer.zero_grad()
    count = (batch["labels"] != IGNORE_INDEX).sum().clamp(min=1)
    losses = []
    for i in range(num_microbatches):
        part = {name: tensor.chunk(num_microbatches)[i] for name, tensor in batch.items()}
        logits_BTV = model(part["input_ids"], part.get("attention_mask"))
        loss = cross_entropy(logits_BTV, part["labels"]).sum() / count
        loss.backward()
        losses.append(loss.detach())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf if max_grad_norm is None else max_grad_norm)
    optimizer.step()
    return torch.stack(losses).sum(), norm


def parameter_names(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> list[str]:
    """The names of the optimizer's parameters in its own order, which its `state_dict()` only numbers."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if strangers := [tuple(p.shape) for p in parameters if id(p) not in names]:
        raise ConversionError(f"the optimizer has parameters that are not the model's, of shapes {strangers}")
    return [names[id(parameter)] for parameter in parameters]


def adamw_state(optimizer: torch.optim.Optimizer, model: GPT2) -> AdamWState:
    """The optimizer's moments and step count as numpy; shares its memory where that is on the CPU.

    Raises `bridge.ConversionError` unless it is an AdamW over all of the model's parameters.
    """
    stored = optimizer.state_dict()  # its entries are the optimizer's own, not copies
    entries = {
        key: {what: array_from_tensor(x) if isinstance(x, Tensor) else x for what, x in entry.items()}
        for key, entry in stored["state"].items()
    }
    return optimizer_state.from_torch({**stored, "state": entries}, parameter_names(optimizer, model), model.config)


def load_adamw_state(optimizer: torch.optim.Optimizer, model: GPT2, state: AdamWState) -> None:
    """Let the optimizer go on from `state`, which is copied; its own hyperparameters stay.

    Moments take the dtypes of their parameters. Raises `bridge.ConversionError` where the state is not that of
    the model's parameters.
    """
    for moments in (state.exp_avg, state.exp_avg_sq):
        bridge.canonicalize(moments, model.config)  # torch looks at no shapes
    groups = optimizer.state_dict()["param_groups"]
    stored = optimizer_state.to_torch(state, parameter_names(optimizer, model), groups)
    entries = {
        key: {what: tensor_from_array(array).clone() for what, array in entry.items()}
        for key, entry in stored["state"].items()
    }
    optimizer.load_state_dict({**stored, "state": entries})

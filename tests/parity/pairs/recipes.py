"""Training recipes for small models, written once for PyTorch and once for JAX with optax.

A mistake is a recipe that differs on one side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from torch import nn

from gpt2_jax.parity.pairs.training.optax_trainer import optax_trainer, record_gradients
from gpt2_jax.parity.pairs.training.torch_trainer import torch_trainer
from gpt2_jax.parity.pairs.training.trainers import Trainer

IGNORE = -100
Batch = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Recipe:
    """How to train. Defaults are AdamW without any extra."""

    kind: str = "mlp"
    """"mlp" classifies vectors; "tokens" classifies each token of masked rows, and may tie its tables."""
    width: int = 12
    depth: int = 2
    standardize: bool = False
    """Standardize hidden units over the batch, so that the true gradient of the bias before is zero."""
    tied: bool = False
    dropout: float = 0.0
    reduction: str = "mean"
    """"mean" over the counted labels, "all" divides by all labels, "sum" does not divide."""
    ignores: bool = True
    """Whether labels of -100 are left out of the loss."""
    optimizer: str = "adamw"
    """"adamw", "adam" (with L2 decay), "sgd"."""
    lr: float = 1e-2
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_biases: bool = True
    momentum: float = 0.9
    nesterov: bool = False
    amsgrad: bool = False
    clip: float | None = None
    schedule: Callable[[int], float] | None = None
    """Factor of the learning rate at a step, counted from 0."""
    microbatches: int = 1
    divides: bool = True
    ema: float | None = None
    ema_before: bool = False
    ema_debias: bool = False
    frozen: str = ""
    """A parameter that is not given to the optimizer."""
    records: bool = False
    """Whether JAX records the gradients that the optimizer receives."""
    dtype: str = "float64"
    offset: int = 0
    """Use the batch that comes this many later in the list."""


IN, CLASSES, VOCABULARY = 5, 7, 11


def parameters(recipe: Recipe, seed: int = 0) -> dict[str, np.ndarray]:
    """Initial values by PyTorch's names."""
    rng = np.random.default_rng(seed)
    sizes = [IN, *[recipe.width] * recipe.depth]
    found = {}
    if recipe.kind == "tokens":
        found["embed.weight"] = rng.normal(scale=0.7, size=(VOCABULARY, recipe.width))
        sizes[0] = recipe.width
    for k, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        found[f"layers.{k}.weight"] = rng.normal(scale=1.5 / math.sqrt(n_in), size=(n_out, n_in))
        found[f"layers.{k}.bias"] = rng.normal(scale=0.1, size=n_out)
    outputs = VOCABULARY if recipe.kind == "tokens" else CLASSES
    head = rng.normal(scale=0.7, size=(outputs, recipe.width))
    found["head.weight"] = found["embed.weight"].copy() if recipe.kind == "tokens" else head
    return {name: array.astype(recipe.dtype) for name, array in found.items()}


def batches(recipe: Recipe, steps: int = 5, rows: int = 8, seed: int = 1) -> list[Batch]:
    rng = np.random.default_rng(seed)
    if recipe.kind == "mlp":
        return [
            (rng.normal(size=(rows, IN)).astype(recipe.dtype), rng.integers(0, CLASSES, rows)) for _ in range(steps)
        ]
    found = []
    for _ in range(steps):
        ids = rng.integers(0, VOCABULARY, (rows, 6))
        labels = rng.integers(0, VOCABULARY, (rows, 6))
        labels[rng.random(labels.shape) < 0.3] = IGNORE
        labels[:, 0] = np.abs(labels[:, 0]) % VOCABULARY  # each row has a label
        found.append((ids, labels))
    return found


class Model(nn.Module):
    def __init__(self, recipe: Recipe, values: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.recipe = recipe
        if recipe.kind == "tokens":
            self.embed = nn.Embedding(VOCABULARY, recipe.width)
        shapes = [values[f"layers.{k}.weight"].shape for k in range(recipe.depth)]
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_out, n_in in shapes)
        self.head = nn.Linear(recipe.width, len(values["head.weight"]), bias=False)
        self.dropout = nn.Dropout(recipe.dropout)
        self.to(getattr(torch, recipe.dtype))
        self.load_state_dict({name: torch.tensor(array) for name, array in values.items()})
        if recipe.tied:
            self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) if self.recipe.kind == "tokens" else x
        for layer in self.layers:
            x = layer(x)
            if self.recipe.standardize:
                axes = tuple(range(x.ndim - 1))
                x = (x - x.mean(axes)) / torch.sqrt(x.var(axes, correction=0) + 1e-5)
            x = self.dropout(torch.tanh(x))
        return self.head(x)


def torch_losses(logits: torch.Tensor, labels: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    labels = labels if recipe.ignores else labels.clamp(min=0)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="none").view(
        labels.shape
    )


def torch_loss(logits: torch.Tensor, labels: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    losses = torch_losses(logits, labels, recipe)
    if recipe.reduction == "sum":
        return losses.sum()
    counted = (labels != IGNORE).sum() if recipe.ignores and recipe.reduction == "mean" else labels.numel()
    return losses.sum() / counted


def train_in_torch(recipe: Recipe, data: list[Batch], seed: int = 0, per_token: bool = False) -> Trainer:
    """The trainer of a recipe in PyTorch. Batches are given by their index."""
    model = Model(recipe, parameters(recipe, seed))
    named = [(name, p) for name, p in model.named_parameters() if name != recipe.frozen]
    groups = [
        {"params": [p for name, p in named if name.endswith("weight")], "weight_decay": recipe.weight_decay},
        {
            "params": [p for name, p in named if not name.endswith("weight")],
            "weight_decay": recipe.weight_decay if recipe.decay_biases else 0.0,
        },
    ]
    if recipe.optimizer == "sgd":
        optimizer: Any = torch.optim.SGD(groups, recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov)
    else:
        kind = {
            ("adamw", False): torch.optim.AdamW,
            ("adam", False): torch.optim.Adam,
            ("adamw", True): torch.optim.NAdam,
        }[recipe.optimizer, recipe.nesterov]
        optimizer = kind(groups, recipe.lr, betas=(recipe.b1, recipe.b2), eps=recipe.eps, amsgrad=recipe.amsgrad)
    factor = recipe.schedule or (lambda step: 1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()} if recipe.ema is not None else None
    raw = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    count = 0

    def update_ema() -> None:
        for name, p in model.named_parameters():
            if ema is None or recipe.ema is None:
                return
            if recipe.ema_debias:
                raw[name] = recipe.ema * raw[name] + (1 - recipe.ema) * p.detach()
                ema[name].copy_(raw[name] / (1 - recipe.ema**count))
            else:
                ema[name].lerp_(p.detach(), 1 - recipe.ema)

    def step(index: int) -> float:
        nonlocal count
        count += 1
        inputs, labels = map(torch.tensor, data[(index + recipe.offset) % len(data)])
        optimizer.zero_grad()
        losses = []
        for x, y in zip(inputs.chunk(recipe.microbatches), labels.chunk(recipe.microbatches), strict=True):
            loss = torch_loss(model(x), y, recipe)
            (loss / recipe.microbatches if recipe.divides else loss).backward()
            losses.append(loss.item())
        if recipe.clip is not None:
            # As `torch.nn.utils.clip_grad_norm_`, which adds 1e-6 to the norm. optax does not.
            norm = torch.sqrt(sum((p.grad**2).sum() for _, p in named))
            for _, p in named:
                p.grad *= torch.clamp(recipe.clip / norm, max=1.0)
        if recipe.ema_before:
            update_ema()
        optimizer.step()
        scheduler.step()
        if not recipe.ema_before:
            update_ema()
        return float(np.mean(losses))

    def losses(index: int) -> torch.Tensor:
        inputs, labels = map(torch.tensor, data[(index + recipe.offset) % len(data)])
        return torch_losses(model(inputs), labels, recipe)

    return torch_trainer(model, optimizer, step, ema=ema, loss=losses if per_token else None)


def jax_logits(p: Any, x: Any, recipe: Recipe, key: Any = None) -> Any:
    x = p["embed.weight"][x] if recipe.kind == "tokens" else x
    for k in range(recipe.depth):
        x = x @ p[f"layers.{k}.weight"].T + p[f"layers.{k}.bias"]
        if recipe.standardize:
            axes = tuple(range(x.ndim - 1))
            x = (x - x.mean(axes)) / jnp.sqrt(x.var(axes) + 1e-5)
        x = jnp.tanh(x)
        if key is not None and recipe.dropout:
            kept = jax.random.bernoulli(jax.random.fold_in(key, k), 1 - recipe.dropout, x.shape)
            x = jnp.where(kept, x / (1 - recipe.dropout), 0)
    return x @ p["embed.weight" if recipe.tied else "head.weight"].T


def jax_losses(logits: Any, labels: Any, recipe: Recipe) -> Any:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return jnp.where(labels != IGNORE, losses, 0) if recipe.ignores else losses


def jax_loss(logits: Any, labels: Any, recipe: Recipe) -> Any:
    losses = jax_losses(logits, labels, recipe)
    if recipe.reduction == "sum":
        return losses.sum()
    counted = (labels != IGNORE).sum() if recipe.ignores and recipe.reduction == "mean" else labels.size
    return losses.sum() / counted


def optax_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    factor = recipe.schedule
    lr = (
        recipe.lr
        if factor is None
        else lambda count: (
            recipe.lr
            * jnp.asarray([factor(k) for k in range(64)], jnp.float64 if recipe.dtype == "float64" else jnp.float32)[
                count
            ]
        )
    )

    def mask(params: Any) -> Any:
        return {name: recipe.decay_biases or name.endswith("weight") for name in params}

    decay = optax.add_decayed_weights(recipe.weight_decay, mask)
    parts = [] if recipe.clip is None else [optax.clip_by_global_norm(recipe.clip)]
    parts += [record_gradients()] if recipe.records else []
    adam = optax.scale_by_adam(recipe.b1, recipe.b2, recipe.eps, nesterov=recipe.nesterov)
    if recipe.amsgrad:
        adam = optax.scale_by_amsgrad(recipe.b1, recipe.b2, recipe.eps)
    parts += {
        "adamw": [adam, decay],
        "adam": [decay, adam],
        "sgd": [decay, *([optax.trace(recipe.momentum, recipe.nesterov)] if recipe.momentum else [])],
    }[recipe.optimizer]
    tx = optax.chain(*parts, optax.scale_by_learning_rate(lr))
    if recipe.frozen:
        labels = lambda params: {name: "frozen" if name == recipe.frozen else "trained" for name in params}  # noqa: E731
        return optax.multi_transform({"trained": tx, "frozen": optax.set_to_zero()}, labels)
    return tx


def train_in_jax(
    recipe: Recipe,
    data: list[Batch],
    seed: int = 0,
    *,
    optimizer: optax.GradientTransformation | None = None,
    per_token: bool = False,
    name: str = "jax",
) -> Trainer:
    """The trainer of a recipe in JAX. Batches are given by their index."""
    tx = optax_optimizer(recipe) if optimizer is None else optimizer
    params = {name: jnp.asarray(array) for name, array in parameters(recipe, seed).items()}
    if recipe.tied:
        del params["head.weight"]
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = {"opt": tx.init(params), "ema": jax.tree.map(jnp.copy, params), "raw": zeros, "step": jnp.zeros((), int)}
    n = recipe.microbatches

    def loss_fn(params: Any, x: Any, y: Any, key: Any) -> Any:
        return jax_loss(jax_logits(params, x, recipe, key), y, recipe)

    def averaged(state: Any, params: Any) -> Any:
        if recipe.ema is None:
            return state
        d, t = recipe.ema, state["step"]
        if recipe.ema_debias:
            raw = jax.tree.map(lambda e, p: d * e + (1 - d) * p, state["raw"], params)
            correction = jnp.asarray([1 - d**k for k in range(64)], recipe.dtype)[t]  # exact, as in PyTorch
            return {**state, "raw": raw, "ema": jax.tree.map(lambda e: e / correction, raw)}
        return {**state, "ema": jax.tree.map(lambda e, p: d * e + (1 - d) * p, state["ema"], params)}

    @jax.jit
    def compiled(params: Any, state: Any, x: Any, y: Any) -> Any:
        state = {**state, "step": state["step"] + 1}
        key = jax.random.fold_in(jax.random.key(0), state["step"])
        losses, gradients = [], zeros
        for xs, ys in zip(jnp.split(x, n), jnp.split(y, n), strict=True):
            loss, g = jax.value_and_grad(loss_fn)(params, xs, ys, key)
            losses.append(loss)
            gradients = jax.tree.map(lambda a, b: a + b / (n if recipe.divides else 1), gradients, g)
        if recipe.ema_before:
            state = averaged(state, params)
        updates, opt = tx.update(gradients, state["opt"], params)
        params = optax.apply_updates(params, updates)
        state = {**state, "opt": opt}
        return params, state if recipe.ema_before else averaged(state, params), jnp.stack(losses).mean()

    def step(params: Any, state: Any, index: int) -> Any:
        return compiled(params, state, *data[(index + recipe.offset) % len(data)])

    def losses(params: Any, index: int) -> Any:
        x, y = data[(index + recipe.offset) % len(data)]
        return jax_losses(jax_logits(params, jnp.asarray(x), recipe), jnp.asarray(y), recipe)

    ema = None if recipe.ema is None else lambda state: state["ema"]
    return optax_trainer(params, state, step, ema=ema, loss=losses if per_token else None, name=name)

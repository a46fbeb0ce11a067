"""A trainer in PyTorch that `compare_training` can observe. Imports PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2_jax.parity.pairs.matching.layouts import Layout
from gpt2_jax.parity.pairs.sides.torch_module import module_layouts
from gpt2_jax.parity.pairs.training.trainers import Arrays, Step, Trainer, numpy_seed, scalar
from gpt2_torch.arrays import array_from_tensor

STATES = {"square_avg": "exp_avg_sq", "step": "count"}
"""Names in `optimizer.state` that differ in `Step.state`."""

SETTINGS = ("lr", "betas", "momentum", "dampening", "nesterov", "eps", "weight_decay", "amsgrad")
"""Hyperparameters of `optimizer.param_groups` that are recorded."""

Ema = torch.nn.Module | Mapping[str, Tensor]


class TorchTrainer(Trainer):
    """See `torch_trainer`."""

    def __init__(
        self,
        module: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        step: Callable[[Any], Any],
        ema: Ema | None,
        loss: Callable[[Any], Any] | None,
        name: str,
    ) -> None:
        self.name = name
        self._module, self._optimizers, self._step, self._loss = module, optimizers, step, loss
        self._ema = ema.state_dict() if isinstance(ema, torch.nn.Module) else ema
        self._gradients: dict[str, np.ndarray] = {}
        self._settings: dict[str, Any] = {}

    def parameters(self) -> Arrays:
        return {name: _array(p) for name, p in self._named()}

    def layouts(self) -> Mapping[str, Layout]:
        return module_layouts(self._module)

    def state(self) -> Arrays:
        arrays = {}
        for name, p in self._named():
            for optimizer in self._optimizers:
                for key, value in optimizer.state.get(p, {}).items():
                    if isinstance(value, Tensor | int | float):
                        arrays[f"{STATES.get(key, key)}/{name}"] = _array(torch.as_tensor(value))
        if self._ema is not None:
            known = {name for name, _ in self._named()}
            for name, value in self._ema.items():
                if (short := name.removeprefix("module.")) in known:  # AveragedModel adds the prefix
                    arrays[f"ema/{short}"] = _array(value)
        return arrays

    def step(self, batch: Any) -> Step:
        self._gradients, self._settings = {}, {}
        with self._observed():
            loss = self._step(batch)
        loss = scalar(loss.detach() if isinstance(loss, Tensor) else loss, self.name)
        return Step(loss, self.parameters(), self.state(), self._gradients or None, self._settings)

    def snapshot(self) -> Any:
        return (
            _cloned(self._module.state_dict()),
            [copy.deepcopy(optimizer.state_dict()) for optimizer in self._optimizers],
            {name: None if p.grad is None else p.grad.clone() for name, p in self._named()},
            None if self._ema is None else _cloned(self._ema),
        )

    def replay(self, snapshot: Any, batch: Any, seed: int = 0) -> Step:
        with self._restored(snapshot), torch.random.fork_rng(), numpy_seed(seed):
            torch.manual_seed(seed)
            return self.step(batch)

    def loss(self, snapshot: Any, batch: Any) -> np.ndarray | None:
        if self._loss is None:
            return None
        with self._restored(snapshot), torch.no_grad():
            return _array(torch.as_tensor(self._loss(batch)))

    def _named(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Tied parameters appear under each of their names."""
        return list(self._module.named_parameters(remove_duplicate=False))

    @contextmanager
    def _observed(self) -> Iterator[None]:
        """Record gradients and hyperparameters when the optimizer's step begins."""

        def record(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            owned = {id(p): group for group in optimizer.param_groups for p in group["params"]}
            for name, p in self._named():
                if id(p) in owned and p.grad is not None:
                    self._gradients[name] = _array(p.grad)
            first = optimizer.param_groups[0]
            self._settings.update({key: first[key] for key in SETTINGS if key in first})

        hooks = [optimizer.register_step_pre_hook(record) for optimizer in self._optimizers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _restored(self, snapshot: Any) -> Iterator[None]:
        """Restore a snapshot within the block."""
        present = self.snapshot()
        try:
            self._load(snapshot)
            yield
        finally:
            self._load(present)

    def _load(self, snapshot: Any) -> None:
        tensors, optimizers, gradients, ema = snapshot
        self._module.load_state_dict(tensors)
        for optimizer, state in zip(self._optimizers, optimizers, strict=True):
            optimizer.load_state_dict(copy.deepcopy(state))
        for name, p in self._named():
            p.grad = None if gradients[name] is None else gradients[name].clone()
        for name, value in (ema or {}).items():
            with torch.no_grad():
                self._ema[name].copy_(value)  # type: ignore[index]


def torch_trainer(
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    step: Callable[[Any], Any],
    *,
    ema: Ema | None = None,
    loss: Callable[[Any], Any] | None = None,
    name: str = "torch",
) -> Trainer:
    """Return the trainer of a PyTorch module.

    Args:
        module: the module. Its parameters give the names.
        optimizer: the optimizer, or several that share the parameters.
        step: `step(batch) -> loss` trains the module in place. Schedulers, clipping, a gradient scaler and accumulation
            belong to it. Hooks record the gradients with which it calls `optimizer.step`.
        ema: averaged parameters, as a module (also `torch.optim.swa_utils.AveragedModel`) or as tensors by name, which
            `step` updates in place.
        loss: `loss(batch)` returns the loss with the present parameters, without training: one value, or one per
            example or token. It sharpens the diagnosis of a difference.
        name: the name in the report.
    """
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    return TorchTrainer(module, optimizers, step, ema, loss, name)


def _array(tensor: Tensor) -> np.ndarray:
    return array_from_tensor(tensor.detach().cpu().clone())


def _cloned(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in tensors.items()}

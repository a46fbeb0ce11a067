"""One side of a comparison that is a PyTorch module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpt2_jax.parity.pairs.matching.layouts import Layout
from gpt2_jax.parity.pairs.sides.projection import projection_weights
from gpt2_jax.parity.pairs.sides.recording import Recorder, named_outputs
from gpt2_jax.parity.pairs.sides.side import DTYPES, Arrays, Description, Forward, Inputs, SideError
from gpt2_torch.arrays import array_from_tensor, tensor_from_array

_WEIGHTS: tuple[tuple[type, str], ...] = (
    (nn.Linear, "oi"),
    (nn.Conv1d, "oiw"),
    (nn.Conv2d, "oihw"),
    (nn.Conv3d, "oidhw"),
    (nn.Embedding, "vc"),
    (nn.LayerNorm, "c"),
    (nn.GroupNorm, "c"),
    (nn.modules.batchnorm._BatchNorm, "c"),
)
"""Module -> the layout of `weight`."""

_GATES = {nn.LSTM: "ifgo", nn.LSTMCell: "ifgo", nn.GRU: "rzn", nn.GRUCell: "rzn"}
"""Module -> the order of its gates, as documented for `weight_ih`."""

_IN_TRAINING = (
    nn.modules.dropout._DropoutNd,
    nn.modules.batchnorm._BatchNorm,
    nn.RNNBase,
    nn.MultiheadAttention,
)
"""Modules that compute a different function in training mode, unless their dropout is 0."""


def torch_side(
    module: nn.Module,
    *,
    name: str = "torch",
    loss: Callable[..., Tensor] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> TorchSide:
    """A PyTorch module as one side of `compare`.

    Every pass runs on a copy of the module. The module itself, its mode and its hooks do not change.

    Args:
        module: the module, in the mode in which it is to be compared. Call `module.eval()` first to compare inference.
        name: the name of the side in the report.
        loss: `loss(output, *inputs)` returns the loss whose gradients are compared. The default is the sum of all
            outputs, each multiplied by a fixed random number.
        kwargs: keyword arguments of every call.
    """
    return TorchSide(module, name, loss, dict(kwargs or {}))


class TorchSide:
    """See `torch_side`."""

    def __init__(
        self, module: nn.Module, name: str, loss: Callable[..., Tensor] | None, kwargs: dict[str, Any]
    ) -> None:
        self.name = name
        self.dtypes = DTYPES
        self.has_loss: bool = loss is not None
        self._module, self._loss, self._kwargs = module, loss, kwargs

    def parameters(self) -> Arrays:
        return module_arrays(self._module)

    def describe(self, inputs: Inputs) -> Description:
        training = [
            f"{path or 'the module'} ({type(child).__name__})"
            for path, child in self._module.named_modules()
            if child.training and isinstance(child, _IN_TRAINING) and getattr(child, "p", getattr(child, "dropout", 1))
        ]
        buffers = frozenset(name for name, _ in self._module.named_buffers(remove_duplicate=False))
        return Description(module_layouts(self._module), buffers, tuple(training))

    def forward(self, inputs: Inputs, dtype: str) -> Forward:
        with self._copy(dtype) as (module, recorder), torch.no_grad():
            before = {name: tensor.clone() for name, tensor in _tensors(module).items()}
            output = self._call(module, recorder, _tensors_of(inputs, dtype))
            changed = [n for n, tensor in _tensors(module).items() if not torch.equal(tensor, before[n])]
            parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
            if wrong := [name for name in changed if name in parameters]:
                raise SideError(self.name, wrong[0], "the forward pass changes this parameter in place")
            state = {name: tensor for name, tensor in _tensors(module).items() if name in changed}
            outputs = named_outputs(output, _is_tensor)
        return Forward(*(_arrays(values) for values in (outputs, recorder.values, state)))

    def gradients(self, inputs: Inputs, dtype: str) -> tuple[float, Arrays] | None:
        with self._copy(dtype) as (module, recorder):
            tensors = _tensors_of(inputs, dtype)
            output = self._call(module, recorder, tensors)
            loss = self._loss(output, *tensors) if self._loss else _projected(named_outputs(output, _is_tensor))
            if loss.requires_grad:
                loss.backward()
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}
        return float(loss.detach()), _arrays(gradients)

    def _call(self, module: nn.Module, recorder: Recorder, tensors: list[Tensor]) -> Any:
        before = [tensor.clone() for tensor in tensors]
        try:
            output = module(*tensors, **self._kwargs)
        except Exception as error:
            raise SideError(self.name, recorder.place, f"{type(error).__name__}: {error}") from error
        for k, (tensor, old) in enumerate(zip(tensors, before, strict=True)):
            if not torch.equal(tensor, old):
                raise SideError(self.name, "", f"the forward pass changes input {k} in place")
        return output

    @contextmanager
    def _copy(self, dtype: str) -> Iterator[tuple[nn.Module, Recorder]]:
        """A copy of the module in another dtype, with hooks that record."""
        try:
            module = copy.deepcopy(self._module).to(getattr(torch, dtype))
        except RuntimeError as error:
            raise SideError(self.name, "", f"the module cannot be copied: {error}") from error
        recorder, default = Recorder(_is_tensor, torch.clone), torch.get_default_dtype()
        for path, child in module.named_modules():
            if path:
                child.register_forward_pre_hook(lambda _, args, path=path: recorder.enter(path, args))
                child.register_forward_hook(lambda _, args, output: recorder.leave(output))
        # Constants that the pass computes have the precision that JAX gives them.
        torch.set_default_dtype(torch.float64 if dtype == "float64" else torch.float32)
        try:
            yield module, recorder
        finally:
            torch.set_default_dtype(default)


def module_arrays(module: nn.Module) -> dict[str, np.ndarray]:
    """The floating-point parameters and persistent buffers of a module. Tied parameters are the same array."""
    return _arrays(_tensors(module))


def module_layouts(module: nn.Module) -> dict[str, Layout]:
    """The layouts of the parameters of `torch.nn`'s modules, and of transformers' `Conv1D`, by name."""
    layouts: dict[str, Layout] = {}
    for path, child in module.named_modules():
        prefix, kind = f"{path}." if path else "", type(child).__name__
        gates = next((order for cell, order in _GATES.items() if isinstance(child, cell)), "")
        axes = "io" if kind == "Conv1D" else next((axes for cell, axes in _WEIGHTS if isinstance(child, cell)), "")
        for leaf, tensor in child.named_parameters(recurse=False):
            owner = f"torch.nn.{kind}.{leaf}" if type(child).__module__.startswith("torch.nn") else f"{kind}.{leaf}"
            if gates:
                layouts[prefix + leaf] = Layout("gi"[: tensor.ndim], owner, blocks=tuple(gates))
            elif axes and leaf == "weight":
                layouts[prefix + leaf] = Layout(axes, owner)
        is_norm = isinstance(child, nn.modules.batchnorm._BatchNorm)
        for leaf, _ in child.named_buffers(recurse=False):
            if not is_norm:
                layouts[prefix + leaf] = Layout("", f"buffer {leaf}", required=False)
    return layouts


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, with all names of tied ones, and the buffers in `state_dict`."""
    saved = module.state_dict(keep_vars=True)
    return {
        name: tensor.detach() for name, tensor in saved.items() if _is_tensor(tensor) and tensor.is_floating_point()
    }


def _tensors_of(inputs: Inputs, dtype: str) -> list[Tensor]:
    tensors = [tensor_from_array(np.array(array)) for array in inputs]
    return [tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor for tensor in tensors]


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: array_from_tensor(tensor) for name, tensor in tensors.items()}


def _projected(outputs: Mapping[str, Tensor]) -> Tensor:
    floats = [tensor for tensor in outputs.values() if tensor.is_floating_point()]
    weights = projection_weights([tuple(tensor.shape) for tensor in floats])
    products = [(x * tensor_from_array(w).to(x.dtype)).sum() for x, w in zip(floats, weights, strict=True)]
    return torch.stack(products).sum()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)

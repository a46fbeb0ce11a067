"""The parameters of an adapter: initialization, and the merge into the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PRNGKeyArray

import bridge
from bridge import GPT2Config
from bridge.conversion import STACK
from bridge.parameter_table import Parameter
from gpt2_jax.lora.branch import A, B
from gpt2_jax.lora.config import LoRAConfig

if TYPE_CHECKING:
    from gpt2_jax.model import GPT2

LoRAParams = Mapping[str, Any]
"""The tree of an adapter: the factors `a` and `b` of each adapted `kernel`, at the path of the kernel's module."""


def lora_init(key: PRNGKeyArray, model: GPT2) -> dict[str, Any]:
    """Return the initial adapter of a model with `lora` set. The adapted model equals the base, because B is zero.

    A is uniform in ±1 / sqrt(in), which is PEFT's initialization (`kaiming_uniform_` with a = sqrt(5)). The values do
    not depend on `model.scan`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bridge import GPT2Config
        >>> from gpt2_jax import GPT2, LoRAConfig, lora_init
        >>> config = GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=2, n_head=2)
        >>> model = GPT2(config, lora=LoRAConfig(rank=4, targets="c_attn,c_fc"))
        >>> lora = lora_init(jax.random.key(0), model)
        >>> jax.tree.map(jnp.shape, lora["h_0"]["attn"])
        {'c_attn': {'a': (8, 4), 'b': (4, 3, 2, 4)}}

    Raises `ValueError` if the model has no adapter, or the settings of its adapter are invalid.
    """
    config = require_lora(model.lora)
    tree: dict[tuple[str, ...], Any] = {}
    for number, parameter in enumerate(adapted_parameters(model.config, config)):
        inputs, outputs = split_axes(parameter)
        bound = 1 / math.sqrt(math.prod(inputs))
        module = parameter.flax_path[:-1]
        own_key = jax.random.fold_in(key, number)
        tree[*module, A] = jax.random.uniform(own_key, (*inputs, config.rank), model.param_dtype, -bound, bound)
        tree[*module, B] = jnp.zeros((config.rank, *outputs), model.param_dtype)
    return unflatten_dict(stacked(tree) if model.scan else tree)


def merge_lora(params: Mapping[str, Any], lora: LoRAParams, config: LoRAConfig) -> dict[str, Any]:
    """Return the parameters with the adapter merged: W + s A B. Use them with a model without `lora`.

    Generation requires merged parameters, which need only one matrix product per projection.

    Args:
        params, lora: trees of the same form, both stacked or both per layer.

    Raises `ValueError` if the adapter changes a kernel that `params` does not have.
    """
    merged, factors = flatten_dict(dict(params)), flatten_dict(dict(lora))
    for (*module, name), a in factors.items():
        if name != A:
            continue
        path = (*module, "kernel")
        if path not in merged:
            raise ValueError(f"the adapter changes {'/'.join(path)}, which the parameters do not have; stack both")
        kernel, b, rank = merged[path], factors[*module, B], a.shape[-1]
        layers = kernel.shape[:1] if module[0] == STACK else ()
        n_in = math.prod(a.shape[len(layers) : -1])
        update = jnp.matmul(a.reshape(*layers, n_in, rank), b.reshape(*layers, rank, -1), precision="highest")
        merged[path] = (kernel + config.scaling * update.reshape(kernel.shape)).astype(kernel.dtype)
    return unflatten_dict(merged)


def require_lora(config: LoRAConfig | None) -> LoRAConfig:
    """Return the settings. Raises `ValueError` if they are None, or not those of an adapter."""
    if config is None:
        raise ValueError("the model has no adapter; make it with GPT2(config, lora=LoRAConfig(...))")
    if config.rank < 1 or not 0 <= config.dropout < 1 or config.unknown_targets or not math.isfinite(config.alpha):
        raise ValueError(f"{config}: needs rank >= 1, a finite alpha, 0 <= dropout < 1, and targets of a layer")
    return config


def adapted_parameters(model: GPT2Config, config: LoRAConfig) -> list[Parameter]:
    """Return the kernels that the adapter changes, in the order of a forward pass."""
    return [p for p in bridge.parameters(model) if p.is_projection and ".".join(p.flax_path[1:-1]) in config.modules]


def split_axes(parameter: Parameter) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the input and the output axes of a kernel."""
    shape, n_in = parameter.flax_shape, parameter.torch_shape[0]
    count = next(n for n in range(1, len(shape)) if math.prod(shape[:n]) == n_in)
    return shape[:count], shape[count:]


def stacked(tree: Mapping[tuple[str, ...], Any]) -> dict[tuple[str, ...], Any]:
    """Stack the layers of a flat tree: `h_0 ... h_{L-1}` become `h`. All layers have the same factors."""
    layers: dict[tuple[str, ...], list[Any]] = {}
    for (_, *rest), leaf in tree.items():
        layers.setdefault((STACK, *rest), []).append(leaf)
    return {path: jnp.stack(leaves) for path, leaves in layers.items()}

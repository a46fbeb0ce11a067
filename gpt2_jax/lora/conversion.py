"""Conversion between the tree of an adapter and `bridge.LoRA`, which `bridge.save_lora` writes in PEFT's format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bridge import ConversionError, LoRA
from bridge.conversion import STACK
from bridge.errors import quoted
from gpt2_jax.lora.branch import A, B
from gpt2_jax.lora.config import PROJECTIONS, LoRAConfig
from gpt2_jax.lora.parameters import LoRAParams, adapted_parameters, split_axes, stacked

if TYPE_CHECKING:
    from bridge import GPT2Config


def adapter_from_lora(lora: LoRAParams, config: LoRAConfig) -> LoRA:
    """Return the tree of an adapter, stacked or per layer, as arrays in memory.

    Example: `bridge.save_lora(adapter_from_lora(lora, model.lora), "my-adapter", base_model="gpt2")`
    """
    factors: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(dict(lora)).items()}
    for (layer, *module, name), a in flat.items():
        if name != A:
            continue
        b = flat[layer, *module, B]
        layers = enumerate(zip(a, b, strict=True)) if layer == STACK else [(int(layer.partition("_")[2]), (a, b))]
        for i, (a_i, b_i) in layers:
            rank = a_i.shape[-1]
            factors[f"{STACK}.{i}.{'.'.join(module)}"] = a_i.reshape(-1, rank).T, b_i.reshape(rank, -1).T
    return LoRA.of(factors, alpha=config.alpha, rank_stabilized=config.rslora)


def lora_from_adapter(adapter: LoRA, model: GPT2Config, *, scan: bool = False) -> tuple[LoRAConfig, dict[str, Any]]:
    """Return the settings and the tree of an adapter, for `GPT2(config, lora=settings)`.

    Args:
        adapter: for example from `bridge.load_lora`.
        model: the configuration of the base.
        scan: return stacked layers.

    Raises `ConversionError` if the updates differ in rank or alpha, change only some of the layers or other matrices
    than projections, or do not fit the model. Merge such an adapter with `bridge.load(..., base=...)`.
    """
    kinds = {(u.rank, u.alpha, u.rank_stabilized) for u in adapter.updates.values()}
    modules = {name.removesuffix(".weight").split(".", 2)[-1] for name in adapter.updates}
    if len(kinds) != 1 or adapter.tensors or not modules <= {*PROJECTIONS}:
        raise ConversionError(
            "this adapter cannot be trained further, because it has several ranks or alphas, or changes more than the "
            "layers' projections; merge it into its base, with bridge.load(adapter, base=...)"
        )
    [(rank, alpha, rslora)] = kinds
    config = LoRAConfig(rank, alpha, ",".join(m for m in PROJECTIONS if m in modules), rslora=rslora)
    expected = {parameter.torch_name: parameter for parameter in adapted_parameters(model, config)}
    if wrong := sorted(expected.keys() ^ adapter.updates.keys()):
        raise ConversionError(f"the adapter does not change the same modules in every layer: {quoted(wrong[0])}")
    tree: dict[tuple[str, ...], Any] = {}
    for name, parameter in expected.items():
        update, (inputs, outputs) = adapter.updates[name], split_axes(parameter)
        n_in, n_out = parameter.torch_shape
        if (update.a.shape, update.b.shape) != ((rank, n_in), (n_out, rank)):
            raise ConversionError(
                f"{quoted(name)}: A has shape {update.a.shape} and B {update.b.shape}; the base has "
                f"{parameter.torch_shape}"
            )
        module = parameter.flax_path[:-1]
        tree[*module, A] = np.ascontiguousarray(update.a.read().T).reshape(*inputs, rank)
        tree[*module, B] = np.ascontiguousarray(update.b.read().T).reshape(rank, *outputs)
    return config, unflatten_dict(stacked(tree) if scan else tree)

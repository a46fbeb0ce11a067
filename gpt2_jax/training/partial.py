"""Training of a part of the weights: a LoRA adapter, or the parameters that a pattern does not freeze.

The trained part is a separate tree, so frozen weights have neither gradients nor optimizer state.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from bridge.conversion import STACK
from bridge.errors import quoted
from gpt2_jax.lora.parameters import merge_lora
from gpt2_jax.model import GPT2
from gpt2_jax.training.errors import TrainingError

Params = Mapping[str, Any]


def freeze_params(params: Params, pattern: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the trained and the frozen part of a Flax tree. `join_params` is the inverse.

    Args:
        params: a tree of arrays or shapes, stacked or per layer.
        pattern: a regular expression. A parameter is frozen if it matches the whole path of the parameter, such as
            `h_0/attn/c_attn/kernel`, or of a module that contains it, such as `h_0` or `h_0/attn`.

    Raises:
        TrainingError: the pattern matches nothing, everything, or only some layers of stacked parameters.

    Example:
        >>> trained, frozen = freeze_params({"wte": {"embedding": 1}, "ln_f": {"scale": 2, "bias": 3}}, "wte|.*/bias")
        >>> trained, frozen
        ({'ln_f': {'scale': 2}}, {'wte': {'embedding': 1}, 'ln_f': {'bias': 3}})
    """
    compiled = re.compile(pattern)
    parts: tuple[dict[tuple[str, ...], Any], ...] = {}, {}
    for path, leaf in flatten_dict(dict(params)).items():
        matches = {_matches(compiled, own) for own in _paths_of_layers(path, leaf)}
        if len(matches) > 1:
            raise TrainingError(
                f"freeze={quoted(pattern)}: matches only some layers of {'/'.join(path)}, and stacked layers are one "
                "array; give --no-scan"
            )
        parts[matches.pop()][path] = leaf
    trained, frozen = parts
    if not trained or not frozen:
        raise TrainingError(
            f"freeze={quoted(pattern)}: matches {'every parameter' if frozen else 'no parameter'}; a path is like "
            "wte/embedding or h_0/attn/c_attn/kernel, and the pattern must match all of it, or a module's whole path"
        )
    return unflatten_dict(trained), unflatten_dict(frozen)


def join_params(trained: Params, frozen: Params) -> dict[str, Any]:
    """Return the tree of both parts."""
    return unflatten_dict({**flatten_dict(dict(frozen)), **flatten_dict(dict(trained))})


def model_variables(model: GPT2, trained: Any, frozen: Any) -> tuple[Any, Any]:
    """Return the parameters and the adapter (or None), from the two parts of a training state."""
    if model.lora is not None:
        return frozen, trained
    return (trained if frozen is None else join_params(trained, frozen)), None


def whole_params(model: GPT2, trained: Any, frozen: Any) -> Any:
    """Return the parameters of the model without an adapter, from the two parts of a training state."""
    params, lora = model_variables(model, trained, frozen)
    return params if lora is None or model.lora is None else merge_lora(params, lora, model.lora)


def trained_fraction(trained: Any, frozen: Any) -> float:
    """Return the fraction of all values that are trained."""
    return num_values(trained) / (num_values(trained) + num_values(frozen))


def num_values(tree: Any) -> int:
    """Return the number of values in the arrays of a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _paths_of_layers(path: tuple[str, ...], leaf: Any) -> Iterable[tuple[str, ...]]:
    """Return the path of a parameter in every layer, for stacked parameters."""
    if path[0] != STACK:
        return [path]
    return [(f"{STACK}_{i}", *path[1:]) for i in range(leaf.shape[0])]


def _matches(pattern: re.Pattern[str], path: tuple[str, ...]) -> bool:
    return any(pattern.fullmatch("/".join(path[:end])) for end in range(1, len(path) + 1))

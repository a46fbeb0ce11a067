"""Conversion between canonical PyTorch names and the Flax tree, derived from `bridge.parameter_table`.

Canonical names and layouts are OpenAI's: no prefix, projections `[in, out]`. Conversion renames tensors and reshapes
views. It neither transposes nor casts, and copies only to stack layers or to pad rows. All tensors must match the
configuration: one `ConversionError` lists every missing, extra, duplicate or misshapen tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from bridge.config import GPT2Config
from bridge.errors import ConversionError, bullet_list, quoted
from bridge.names import canonical_names, is_of_extra_head, not_a_parameter, unknown_prefix
from bridge.parameter_table import Parameter, padded_vocab_size, parameters
from bridge.storage.dtypes import FLOAT_DTYPES
from bridge.storage.tensors import LazyTensorMap, aligned_empty, same_bytes
from bridge.storage.trees import flatten, insert

FlaxTree = dict[str, Any]
"""Nested dictionaries with arrays as leaves, Flax's `params`."""

STACK = "h"
"""The Flax name of stacked layers. Single layers are `h_0`, `h_1`, ..."""


def canonicalize(tensors: Mapping[str, np.ndarray], config: GPT2Config) -> LazyTensorMap:
    """Return a PyTorch state_dict under canonical names, in the order of the parameter table.

    Accepts the names that `canonical_names` accepts. A stored tied head must equal the embedding; it is dropped.

    Raises `ConversionError` unless the tensors are exactly those of the model that `config` describes.
    """
    stored = LazyTensorMap.of(tensors)
    entries = {canonical: stored.entries[name] for canonical, name in canonical_names(stored).items()}
    expected = parameters(config)
    problems = []
    if prefix := unknown_prefix(stored):
        problems.append(
            f"names have the prefix {quoted(prefix)}, which no known wrapper adds; remove it from the names"
        )
    head, embedding = entries.get("lm_head.weight"), entries.get("wte.weight")
    if config.tie_word_embeddings and head and embedding:
        del entries["lm_head.weight"]
        if embedding.dtype in FLOAT_DTYPES and not same_bytes(head, embedding):
            problems.append(
                "lm_head.weight differs from wte.weight although the configuration ties them "
                "(tie_word_embeddings); set tie_word_embeddings to false to keep both"
            )
    problems += differences({p.torch_name: p.torch_shape for p in expected}, entries)
    if problems:
        raise ConversionError("these are not the tensors of the configured GPT-2:\n" + bullet_list(problems))
    return LazyTensorMap({p.torch_name: entries[p.torch_name] for p in expected})


def to_flax(
    tensors: Mapping[str, np.ndarray], config: GPT2Config, *, stacked: bool = False, vocab_multiple: int = 1
) -> FlaxTree:
    """Convert a PyTorch state_dict to the Flax parameter tree of `gpt2_jax.GPT2`.

    Leaves are views of the arrays in `tensors`, unless they are stacked or padded.

    Args:
        tensors: name -> numpy array, with names that `canonicalize` accepts. For a PyTorch model:
            `gpt2_torch.checkpoint_from_model(model).tensors`.
        config: the configuration of the model.
        stacked: return one `h` with a leading layer axis, for `nn.scan`, instead of `h_0 ... h_{L-1}`.
        vocab_multiple: pad the rows of the embedding and the head with zeros to a multiple of this number.

    Raises:
        ConversionError: the tensors are not those of the model, or layers of different dtypes would be stacked.
    """
    canonical = canonicalize(tensors, config)
    rows = padded_vocab_size(config.vocab_size, vocab_multiple)
    if stacked and (mixed := mixed_dtypes(canonical, config)):
        raise ConversionError(
            "layers of different dtypes cannot be stacked; keep them per layer, or cast first:\n" + bullet_list(mixed)
        )
    tree: FlaxTree = {}
    for parameter in parameters(config):
        array = canonical[parameter.torch_name].reshape(parameter.flax_shape)
        if parameter.has_vocabulary_rows:
            array = _with_rows(array, rows)
        if stacked and parameter.layer is not None:
            path = (STACK, *parameter.flax_path[1:])
            if parameter.layer == 0:
                insert(tree, path, aligned_empty((config.n_layer, *array.shape), array.dtype))
            _leaf(tree, path)[parameter.layer] = array
        else:
            insert(tree, parameter.flax_path, array)
    return tree


def to_torch(params: Mapping[str, Any], config: GPT2Config, *, vocab_multiple: int = 1) -> dict[str, np.ndarray]:
    """Convert a Flax parameter tree to a PyTorch state_dict with canonical names.

    The projections of attention may also have PyTorch's shapes, which other Flax GPT-2s use: `c_attn` with a kernel
    `[D, 3 D]` and a bias `[3 D]`, `c_proj` with a kernel `[D, D]`. Kernels are `[in, out]`.

    Args:
        params: the tree, with single or stacked layers. Leaves are numpy or JAX arrays; JAX arrays are copied to the
            host one at a time.
        config: the configuration of the model.
        vocab_multiple: the multiple to which the vocabulary was padded. The padding is removed.

    Raises:
        ConversionError: the leaves are not those of the model.
    """
    if set(params) == {"params"}:
        raise ConversionError('pass the parameter tree itself: variables["params"], not variables')
    leaves = flatten(unstack_layers(params) if STACK in params else params)
    rows = padded_vocab_size(config.vocab_size, vocab_multiple)
    paths = {"/".join(p.flax_path): p for p in parameters(config)}
    shapes = {path: _shape_in_tree(p, leaves.get(path), rows) for path, p in paths.items()}
    if problems := differences(shapes, leaves):
        raise ConversionError("this is not the parameter tree of the configured GPT-2:\n" + bullet_list(problems))
    state = {}
    for path, p in paths.items():
        array = np.asarray(leaves[path])
        state[p.torch_name] = (array[: config.vocab_size] if p.has_vocabulary_rows else array).reshape(p.torch_shape)
    return state


def _shape_in_tree(parameter: Parameter, leaf: Any, rows: int) -> tuple[int, ...]:
    """Return the shape that a leaf must have: PyTorch's if it has as many axes, otherwise that of `to_flax`."""
    if parameter.has_vocabulary_rows:
        return (rows, *parameter.flax_shape[1:])
    is_flat = leaf is not None and np.ndim(leaf) == len(parameter.torch_shape)
    return parameter.torch_shape if is_flat else parameter.flax_shape


def stack_layers(params: Mapping[str, Any]) -> FlaxTree:
    """Return the tree with `h_0 ... h_{L-1}` stacked into one `h`, whose leaves have a leading layer axis.

    Raises `ConversionError` if layers are missing, or differ in names, shapes or dtypes.
    """
    tree = {name: subtree for name, subtree in params.items() if not re.fullmatch(r"h_\d+", name)}
    names = [f"{STACK}_{i}" for i in range(len(params) - len(tree))]
    if not names or STACK in params or any(name not in params for name in names):
        raise ConversionError(f"layers must be h_0, h_1, ... without gaps, but the tree has {sorted(params)}")
    layers = [flatten(params[name]) for name in names]
    mismatched = [
        f"{name}/{path} does not have the shape and dtype of h_0/{path}"
        for name, layer in zip(names, layers, strict=True)
        for path in {**layers[0], **layer}
        if path not in layer or path not in layers[0] or not _stackable(layer[path], layers[0][path])
    ]
    if mismatched:
        raise ConversionError("cannot stack layers that differ:\n" + bullet_list(mismatched))
    for path in layers[0]:
        insert(tree, (STACK, *path.split("/")), np.stack([layer[path] for layer in layers]))
    return tree


def unstack_layers(params: Mapping[str, Any]) -> FlaxTree:
    """Return the tree with the stacked `h` split into `h_0 ... h_{L-1}`. Leaves are views."""
    tree = {name: subtree for name, subtree in params.items() if name != STACK}
    if STACK not in params or any(re.fullmatch(r"h_\d+", name) for name in tree):
        raise ConversionError(
            f"stacked layers must be in one h without h_0, h_1, ..., but the tree has {sorted(params)}"
        )
    for path, leaf in flatten(params[STACK]).items():
        if not leaf.ndim:
            raise ConversionError(f"{STACK}/{path} has no layer axis")
        for i in range(leaf.shape[0]):
            insert(tree, (f"{STACK}_{i}", *path.split("/")), leaf[i])
    return tree


def mixed_dtypes(tensors: LazyTensorMap, config: GPT2Config) -> list[str]:
    """Return one line for each parameter whose dtype differs from that of an earlier layer. These cannot be stacked."""
    first: dict[tuple[str, ...], Parameter] = {}
    problems = []
    for p in parameters(config):
        if p.layer is None:
            continue
        like = first.setdefault(p.flax_path[1:], p).torch_name
        dtype, other = (tensors.entries[name].dtype for name in (p.torch_name, like))
        if dtype != other:
            problems.append(f"{p.torch_name} holds {dtype}, but {like} holds {other}")
    return problems


def differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Any]) -> list[str]:
    """Return one line for each tensor that is missing, misshapen, unexpected, or not of a float type.

    Args:
        expected: name -> shape.
        found: name -> array, or another object with a shape and a dtype.
    """
    missing = [f"{name} is missing (shape {shape})" for name, shape in expected.items() if name not in found]
    misshapen = [
        f"{name} has shape {found[name].shape}; the configuration requires {shape}"
        + _known_mistake(name, tuple(found[name].shape), shape)
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    extra = [not_a_parameter(name, is_head=is_of_extra_head(name)) for name in found if name not in expected]
    allowed = ", ".join(map(str, FLOAT_DTYPES))
    unusable = [
        f"{quoted(name)} holds {array.dtype}; weights must be one of {allowed}"
        for name, array in found.items()
        if array.dtype not in FLOAT_DTYPES
    ]
    return missing + misshapen + extra + unusable


def _known_mistake(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Return a hint at the most likely cause of a wrong shape, or an empty string."""
    if len(found) == 2 and found == expected[::-1]:
        return ": it is transposed; another format may store it this way"
    if name.split(".")[0].split("/")[0] in ("wte", "lm_head") and found[1:] == expected[1:] and found[0] > expected[0]:
        return (
            f": is the vocabulary padded? Set vocab_size to {found[0]}, then reduce it with gpt2 convert --vocab-size"
        )
    return ""


def _leaf(tree: FlaxTree, path: tuple[str, ...]) -> np.ndarray:
    node: Any = tree
    for name in path:
        node = node[name]
    return node


def _with_rows(array_VD: np.ndarray, rows: int) -> np.ndarray:
    if rows == len(array_VD):
        return array_VD
    padded = aligned_empty((rows, *array_VD.shape[1:]), array_VD.dtype)
    padded[: len(array_VD)] = array_VD
    padded[len(array_VD) :] = 0
    return padded


def _stackable(a: Any, b: Any) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype

"""Recognition of reordered models: permuted heads and feed-forward units, and layers in another place.

A permutation of the heads of a layer, applied to the columns of query, key and value and to the rows of `c_proj`, does
not change the function. Neither does one of the feed-forward units, applied to the columns of `c_fc` and the rows of
`c_proj`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bridge.comparison.values import narrower
from bridge.config import GPT2Config
from bridge.diagnostics import fingerprint
from bridge.parameter_table import PARAMETERS, Parameter, parameters
from bridge.storage.tensors import LazyTensor, LazyTensorMap, contiguous

Entries = Mapping[str, LazyTensor]

UNITS: Mapping[str, str] = {"H": "heads", "F": "feed-forward units"}
"""Axis letter of the parameter table -> the name of what can be permuted along this axis."""


@dataclass(frozen=True)
class Permutation:
    """Another order of the heads or feed-forward units of one layer."""

    layer: int
    units: str
    """A value of `UNITS`."""
    order: tuple[int, ...]
    """Unit k of A is unit `order[k]` of B."""
    names: tuple[str, ...]
    """The tensors that have this order."""
    is_same_function: bool
    """Whether these are all tensors with an axis of these units, with equal bits."""
    is_rounded: bool = False
    """Whether the tensors have this order only after the wider dtype is cast to the narrower one."""


def permutations(
    a: Entries, b: Entries, configs: tuple[GPT2Config, GPT2Config], unequal: set[str]
) -> tuple[Permutation, ...]:
    """Find the layers whose heads or feed-forward units have another order in B.

    Args:
        a, b: the canonical tensors of two models.
        configs: their configurations.
        unequal: the names of the tensors that differ.
    """
    of_a, of_b = ({p.torch_name: p for p in parameters(config)} for config in configs)
    found: list[Permutation] = []
    for layer in sorted({p.layer for name, p in of_a.items() if name in unequal and p.layer is not None}):
        for letter, units in UNITS.items():
            axes = {name: axis for name, axis in _axes(letter, layer) if name in a and name in b}
            shapes = [{name: side[name].flax_shape for name in axes if name in side} for side in (of_a, of_b)]
            if unequal & {*axes} and shapes[0] == shapes[1]:
                dtypes = {name: narrower(a[name].dtype, b[name].dtype) for name in axes}
                first, second = (
                    {name: _digests(side[name], of_a[name], axes[name], dtypes[name]) for name in axes}
                    for side in (a, b)
                )
                rounded = {name for name in axes if a[name].dtype != b[name].dtype}
                found += _orders(layer, units, first, second, rounded)
    return tuple(found)


def _axes(letter: str, layer: int) -> Iterator[tuple[str, int]]:
    """Yield the name of each tensor of a layer with this axis, and the number of the axis in its Flax shape."""
    for row in PARAMETERS:
        letters = re.sub(r"[() ]", "", row.axes)
        if letter in letters:
            yield row.torch.format(i=layer), letters.index(letter)


def _digests(entry: LazyTensor, parameter: Parameter, axis: int, dtype: np.dtype) -> list[bytes]:
    """Return a digest of the values of each unit, cast to `dtype`."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = entry.read().astype(dtype, copy=False)
    units = contiguous(np.moveaxis(values.reshape(parameter.flax_shape), axis, 0))
    return [hashlib.sha256(unit.tobytes()).digest() for unit in units]


def _orders(
    layer: int, units: str, a: Mapping[str, list[bytes]], b: Mapping[str, list[bytes]], rounded: set[str]
) -> Iterator[Permutation]:
    """Yield the order of all tensors in B. If they have no common order, yield that of each permuted tensor.

    `rounded`: the tensors whose dtype was cast.
    """
    if (order := _order([*zip(*a.values(), strict=True)], [*zip(*b.values(), strict=True)])) is not None:
        if order != tuple(range(len(order))):
            yield Permutation(layer, units, order, tuple(a), not rounded, bool(rounded))
        return
    for name in a:
        if (order := _order(a[name], b[name])) is not None and a[name] != b[name]:
            yield Permutation(layer, units, order, (name,), False, name in rounded)


def _order(a: Sequence[object], b: Sequence[object]) -> tuple[int, ...] | None:
    """Return the positions in `b` of the elements of `a`, each used once. None if `b` is not a permutation of `a`.

    >>> _order("abb", "bab")
    (1, 0, 2)
    """
    places: dict[object, list[int]] = {}
    for place in reversed(range(len(b))):
        places.setdefault(b[place], []).append(place)
    try:
        return tuple(places[element].pop() for element in a)
    except (KeyError, IndexError):
        return None


def copied_layers(a: Entries, b: Entries, unequal: set[str]) -> tuple[tuple[int, int], ...]:
    """Return (i, j) for each layer i of A that has the bits of layer j of B, among the layers that differ."""
    layers = sorted({int(match[1]) for name in unequal if (match := re.match(r"h\.(\d+)\.", name))})
    places: dict[str, int] = {}
    for layer in reversed(layers):
        if digest := _layer_digest(b, layer):
            places[digest] = layer
    pairs = ((layer, places.get(_layer_digest(a, layer))) for layer in layers)
    return tuple((layer, place) for layer, place in pairs if place is not None)


def _layer_digest(entries: Entries, layer: int) -> str:
    """Return the fingerprint of one layer, or an empty string if the model has no such layer."""
    prefix = f"h.{layer}."
    own = {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}
    return fingerprint(LazyTensorMap(own)) if own else ""

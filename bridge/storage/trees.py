"""Access to the leaves of nested dictionaries by path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bridge.errors import ConversionError, quoted


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries by path.

    >>> flatten({"h_0": {"ln_1": {"scale": 1.0}}})
    {'h_0/ln_1/scale': 1.0}

    Raises `ConversionError` for a name that is not text, such as the tuples of Flax's `flatten_dict`.
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if not isinstance(name, str):
            raise ConversionError(f"{quoted(name)}: a tree is nested, or flat with names such as h_0/ln_1/scale")
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}/"))
        else:
            flat[prefix + name] = value
    return flat


def insert(tree: dict[str, Any], path: Sequence[str], leaf: Any) -> None:
    """Insert a leaf into nested dictionaries. Creates the dictionaries on its path."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf

"""Access to the leaves of nested dictionaries by path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries by path.

    >>> flatten({"h_0": {"ln_1": {"scale": 1.0}}})
    {'h_0/ln_1/scale': 1.0}
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
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

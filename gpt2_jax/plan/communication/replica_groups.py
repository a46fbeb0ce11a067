"""Parser of the device groups of a collective in HLO text. XLA writes them in four forms."""

from __future__ import annotations

import math
import re

import numpy as np

Groups = tuple[tuple[int, ...], ...]
"""Groups of devices that communicate with each other, as indices in the mesh."""

_IOTA = r"\[[\d,]+\](?:T\([\d,]+\))?"


def replica_groups(attributes: str, num_devices: int) -> Groups:
    """The groups in an instruction's attributes. By default, all devices form one group.

    >>> replica_groups("replica_groups={{0,1},{2,3}}", 4)
    ((0, 1), (2, 3))
    >>> replica_groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4)
    ((0, 2), (1, 3))
    >>> replica_groups("replica_groups=mesh['a'=2,'b'=2] {'a'}", 4)
    ((0, 2), (1, 3))
    """
    if (listed := re.search(r"replica_groups=\{(\{[\d,{}\s]*\})\}", attributes)) is not None:
        return tuple(tuple(int(i) for i in g.split(",") if i) for g in re.findall(r"\{([\d,]*)\}", listed[1]))
    if (iota := re.search(rf"replica_groups=\[(\d+),(\d+)\]<=({_IOTA})", attributes)) is not None:
        return _rows(_iota(iota[3]).reshape(int(iota[1]), int(iota[2])))
    if (mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\s*\{([^}]*)\}", attributes)) is not None:
        return _mesh_groups(mesh[1], mesh[2], mesh[3])
    return (tuple(range(num_devices)),)


def source_target_pairs(attributes: str) -> Groups:
    """The (sender, receiver) pairs of a collective-permute, without devices that send to themselves."""
    pairs = re.search(r"source_target_pairs=\{([{}\d,\s]*)\}", attributes)
    found = re.findall(r"\{(\d+),(\d+)\}", pairs[1]) if pairs else []
    return tuple((int(source), int(target)) for source, target in found if source != target)


def _mesh_groups(axes: str, order: str, group_axes: str) -> Groups:
    """Groups along axes of a mesh: `mesh['a'=4,'b'=2], device_ids=(...) {'a'}`.

    `'a':(2)4` is a part of an axis: the axis is split into sizes (2, 4, rest), and the group is along the 4.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    parts = {name: (int(pre), int(size)) for name, pre, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", group_axes)}
    shape: list[int] = []
    grouped: list[int] = []
    for name, size in sizes.items():
        before, own = parts.get(name, (1, size))
        if re.search(rf"'{re.escape(name)}'", group_axes):
            grouped.append(len(shape) + 1)
        shape += (before, own, size // (before * own))
    others = [axis for axis in range(len(shape)) if axis not in grouped]
    grid = _device_ids(order, math.prod(sizes.values())).reshape(shape).transpose(*others, *grouped)
    return _rows(grid.reshape(-1, math.prod(shape[axis] for axis in grouped)))


def _device_ids(order: str, count: int) -> np.ndarray:
    if (iota := re.search(r"device_ids=\((\[[\d,]+\](?:<=\[[\d,]+\])?(?:T\([\d,]+\))?)\)", order)) is not None:
        return _iota(iota[1].split("<=")[-1])
    if (listed := re.search(r"device_ids=\(([\d,\s]+)\)", order)) is not None:
        return np.array([int(i) for i in listed[1].split(",")])
    return np.arange(count)


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: the numbers 0, 1, 2 ... in this shape, transposed, and flattened."""
    shape, _, order = text.partition("T")
    grid = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return (grid.transpose(_numbers(order)) if order else grid).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _rows(grid: np.ndarray) -> Groups:
    return tuple(tuple(int(i) for i in row) for row in grid)

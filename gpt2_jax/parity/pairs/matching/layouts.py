"""How frameworks store the axes of a parameter, and the transform from one layout to another.

A layout is a string with one letter per axis: `oi` for `torch.nn.Linear.weight` [out, in], `io` for a Flax kernel
[in, out], `oihw` and `hwio` for convolutions. Adjacent axes with the same letter are one axis that is split, as in the
kernel `ioo` [in, heads, head size] of `DenseGeneral`. Layouts come from the kind of a module, never from shapes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Transform = Callable[[np.ndarray], np.ndarray]

_WORDS = {"o": "out", "i": "in", "h": "height", "w": "width", "d": "depth", "v": "row", "c": "channel", "g": "gates"}

_BY_RANK = {1: ("o",), 2: ("oi", "io"), 3: ("oiw", "wio"), 4: ("oihw", "hwio", "ohwi"), 5: ("oidhw", "dhwio")}
"""The layouts in use for weights of each rank. They are tried where the layout of a side is not known."""


@dataclass(frozen=True)
class Layout:
    """The layout of one parameter."""

    axes: str
    owner: str
    """The module and the name of the parameter in it, such as `nn.Dense.kernel`, for messages."""
    required: bool = True
    """Whether the other side must have it too. A buffer that holds a table may be missing there."""
    blocks: tuple[str, ...] = ()
    """The names of the equal blocks along the first axis, such as the gates of an LSTM."""

    def __str__(self) -> str:
        words = [_WORDS.get(letter, letter) for letter, _ in itertools.groupby(self.axes)]
        return f"{self.owner} is [{', '.join(words)}]"


def layout_by_name(name: str, rank: int) -> Layout | None:
    """The layout that the name of a parameter implies by convention, or None.

    >>> layout_by_name("layers.0.kernel", 2).axes
    'io'
    """
    leaf = name.replace("/", ".").rpartition(".")[2]
    axes = {("kernel", 2): "io", ("kernel", 4): "hwio", ("embedding", 2): "vc"}.get((leaf, rank))
    return None if axes is None else Layout(axes, leaf)


def merged(axes: str, shape: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """Merge adjacent axes with the same letter. Returns the letters and sizes.

    >>> merged("ioo", (8, 2, 4))
    ('io', (8, 8))
    """
    groups = [
        (letter, math.prod(size for _, size in group))
        for letter, group in itertools.groupby(zip(axes, shape, strict=True), key=lambda pair: pair[0])
    ]
    return "".join(letter for letter, _ in groups), tuple(size for _, size in groups)


def between(left: str, right: str, left_shape: Sequence[int], right_shape: Sequence[int]) -> Transform | None:
    """The transform of an array with layout `right` to the layout `left`. None if the shapes do not fit."""
    if len(left) != len(left_shape) or len(right) != len(right_shape):
        return None
    left_letters, left_sizes = merged(left, left_shape)
    right_letters, right_sizes = merged(right, right_shape)
    if len(left_letters) == len(right_letters) == 1:
        order: tuple[int, ...] = (0,)  # vectors have one layout, whatever the letter
    elif sorted(left_letters) != sorted(right_letters):
        return None
    else:
        order = tuple(right_letters.index(letter) for letter in left_letters)
    if left_sizes != tuple(right_sizes[k] for k in order):
        return None
    target = tuple(left_shape)
    return lambda x: x.reshape(right_sizes).transpose(order).reshape(target)


def candidates(
    left: Layout | None, right: Layout | None, left_shape: Sequence[int], right_shape: Sequence[int]
) -> dict[str, Transform]:
    """The transforms of the right array that fit the shapes, by description.

    There is at most one if both layouts are known. Where one is unknown, each layout in use for the rank is tried.
    """
    if len(left_shape) == len(right_shape) <= 1:
        return {"": lambda x: x} if tuple(left_shape) == tuple(right_shape) else {}
    if left is not None and right is not None:
        transform = between(left.axes, right.axes, left_shape, right_shape)
        same = left.axes == right.axes
        return {} if transform is None else {"" if same else f"{left}, {right}": transform}
    if left is not None:
        pairs = [(left.axes, axes) for axes in _others(left, len(right_shape))]
    elif right is not None:
        pairs = [(axes, right.axes) for axes in _others(right, len(left_shape))]
    else:
        first = _BY_RANK.get(len(left_shape), ())[:1]
        pairs = [*itertools.product(first, _BY_RANK.get(len(right_shape), ()))]
    pairs.sort(key=lambda pair: pair[0] != pair[1])  # the same layout first
    found: dict[str, Transform] = {}
    for a, b in pairs:
        if (transform := between(a, b, left_shape, right_shape)) is not None:
            found[f"both [{_spelled(a)}]" if a == b else f"[{_spelled(b)}] for [{_spelled(a)}]"] = transform
    if not pairs and tuple(left_shape) == tuple(right_shape):
        return {"": lambda x: x}
    return found


def _others(known: Layout, rank: int) -> tuple[str, ...]:
    """The layouts that the other side can have, for a known layout on one side."""
    if set(known.axes) <= set("vcg") | {"i"} and "o" not in known.axes:
        return (known.axes, known.axes[::-1]) if rank == len(known.axes) else ()
    return _BY_RANK.get(rank, ())


def _spelled(axes: str) -> str:
    return ", ".join(_WORDS.get(letter, letter) for letter in axes)

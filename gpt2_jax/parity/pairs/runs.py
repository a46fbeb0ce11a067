"""The runs of two sides on the same inputs. Each run is made once. If a side fails, the error names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from bridge.errors import escaped
from gpt2_jax.parity.pairs.bounds import Size, rounding_error
from gpt2_jax.parity.pairs.matching.match import Match, Matching, Names, match_names
from gpt2_jax.parity.pairs.matching.names import normalised, renaming, without_wrappers
from gpt2_jax.parity.pairs.sides.side import Arrays, Description, Forward, Inputs, Side, SideError

T = TypeVar("T")


class Runs:
    """What two sides compute, and how their names correspond. Side 0 is the left one, the reference."""

    def __init__(self, left: Side, right: Side, inputs: Inputs, names: Names, dtypes: tuple[str, ...]) -> None:
        self.sides: tuple[Side, Side] = (left, right)
        self.inputs = inputs
        self.dtypes: tuple[str, ...] = tuple(d for d in dtypes if d in left.dtypes and d in right.dtypes)
        self._names = names
        self._kept: dict[tuple[Any, ...], Any] = {}

    def forward(self, side: int, dtype: str) -> Forward:
        """The first pass of a side in `dtype`.

        Raises:
            SideError: the side fails, or its outputs are not numbers.
        """
        return self._once(("forward", side, dtype), lambda: self.run(side, self.inputs, dtype))

    def run(self, side: int, inputs: Inputs, dtype: str) -> Forward:
        """Run a side, and validate what it returns. The same errors as `forward`."""
        name, copies = self.sides[side].name, tuple(np.array(array) for array in inputs)

        def validated() -> Forward:
            forward = self.sides[side].forward(copies, dtype)
            for k, (array, copy) in enumerate(zip(inputs, copies, strict=True)):
                if array.tobytes() != copy.tobytes():
                    raise SideError(name, "", f"the forward pass changes input {k} in place")
            if not forward.outputs:
                raise SideError(name, "", "the forward pass returns no array")
            _require_numbers(name, forward, dtype)
            return forward

        return self._guarded(side, validated)

    def gradients(self, side: int, dtype: str) -> tuple[float, Arrays] | None:
        """The loss and gradients of a side in `dtype`. None if it has none. The same errors as `forward`."""

        def run() -> tuple[float, Arrays] | None:
            copies = tuple(np.array(array) for array in self.inputs)
            found = self._guarded(side, lambda: self.sides[side].gradients(copies, dtype))
            for name, array in (found[1] if found else {}).items():
                if np.isnan(array.astype(np.float64)).any():
                    raise SideError(self.sides[side].name, name, f"the gradient in {dtype} is NaN")
            return found

        return self._once(("gradients", side, dtype), run)

    def description(self, side: int) -> Description:
        return self._once(
            ("description", side), lambda: self._guarded(side, lambda: self.sides[side].describe(self.inputs))
        )

    def parameters(self, side: int) -> Arrays:
        return self._once(("parameters", side), lambda: self._guarded(side, self.sides[side].parameters))

    @cached_property
    def size(self) -> Size:
        """Depth and width of the left model, or of the right one if the left one is a golden."""
        arrays = self.parameters(0) or self.parameters(1)
        return Size.of((array.shape for array in arrays.values()), self.inputs)

    @cached_property
    def matching(self) -> Matching:
        """The parameters of both sides. Empty if a side has none, as a golden.

        Raises:
            MatchError: see `match_names`.
        """
        left, right = self.parameters(0), self.parameters(1)
        if not left or not right:
            return Matching()
        layouts = [self.description(side).layouts for side in (0, 1)]
        orders = [self._order(side) for side in (0, 1)]
        names = self._names
        if isinstance(names, Mapping):  # entries may name modules without parameters
            known = [{*self.parameters(k), *self._recorded(k)} for k in (0, 1)]
            renaming(names, *known)
            names = {a: b for a, b in names.items() if _has(left, a) and (b is None or _has(right, b))}
        return match_names(
            left,
            right,
            names,
            left_layouts=layouts[0],
            right_layouts=layouts[1],
            left_order=orders[0],
            right_order=orders[1],
        )

    def pairs(self, left: Arrays, right: Arrays) -> dict[str, str]:
        """Left name -> right name of outputs or intermediates. The others have no counterpart."""
        rename, excluded = self._renaming
        used: set[str] = set()
        found: dict[str, str] = {}
        if len(left) == len(right) == 1:
            return {next(iter(left)): next(iter(right))}
        for key in (lambda n: n, lambda n: normalised(n, is_parameter=False), _unwrapped):
            theirs = {key(name): name for name in reversed([*right]) if name not in used}
            for name in left:
                other = theirs.get(key(rename(name)))
                if name not in found and other is not None and other not in used and not excluded(name):
                    found[name] = other
                    used.add(other)
        return found

    def is_excluded(self, name: str) -> bool:
        """Whether the user's mapping leaves out this name of the left side."""
        return self._renaming[1](name)

    @cached_property
    def _renaming(self) -> tuple[Callable[[str], str], Callable[[str], bool]]:
        """Rename a left module by the user's mapping, or as its parameters are matched."""
        given = self._names if isinstance(self._names, Mapping) else {}
        rename, excluded = renaming(given, [*given], [name for name in given.values() if name])
        owners = {_owner(m.left): _owner(m.right) for m in self.matching.matches if _owner(m.left) and _owner(m.right)}

        def by_parameters(name: str) -> str:
            renamed = rename(name)
            base = name.partition(":")[0].partition("#")[0].partition("[")[0]
            return renamed if renamed != name or base not in owners else owners[base] + name[len(base) :]

        return by_parameters, excluded

    def rounding(self, section: str, names: Mapping[int, str]) -> list[float]:
        """The error in float32 of an array of each side: of its outputs, intermediates or state.

        Args:
            names: side -> the name of the array.
        """
        found = []
        for side, name in names.items():
            try:
                exact = getattr(self.forward(side, "float64"), section)[name]
                rounded = (
                    getattr(self.forward(side, "float32"), section).get(name) if "float32" in self.dtypes else None
                )
            except SideError:  # the check of float32 reports it
                continue
            if rounded is not None and rounded.shape == exact.shape:
                found.append(rounding_error(exact, rounded))
        return found

    def _order(self, side: int) -> tuple[str, ...]:
        """Modules in the order of the forward pass, or nothing if the pass fails, which `forward` reports."""
        return tuple(name.partition(":")[0] for name in self._recorded(side))

    def _recorded(self, side: int) -> tuple[str, ...]:
        try:
            forward = self.forward(side, self.dtypes[0])
        except SideError:
            return ()
        return (*forward.intermediates, *forward.outputs)

    def _guarded(self, side: int, run: Callable[[], T]) -> T:
        """Report any error as one of the side."""
        try:
            return run()
        except SideError:
            raise
        except Exception as error:
            raise SideError(self.sides[side].name, "", escaped(f"{type(error).__name__}: {error}")) from error

    def _once(self, key: tuple[Any, ...], run: Callable[[], T]) -> T:
        if key not in self._kept:
            try:
                self._kept[key] = run()
            except SideError as error:
                self._kept[key] = error
        if isinstance(self._kept[key], SideError):
            raise self._kept[key]
        return self._kept[key]


def _require_numbers(side: str, forward: Forward, dtype: str) -> None:
    wrong = [name for name, array in forward.outputs.items() if np.isnan(array.astype(np.float64)).any()]
    if wrong:
        inside = (name for name, array in forward.intermediates.items() if np.isnan(array.astype(np.float64)).any())
        raise SideError(side, next(inside, wrong[0]), f"NaN in {dtype}")


def _has(arrays: Arrays, prefix: str) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for name in arrays)


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _unwrapped(name: str) -> tuple[str, ...]:
    return without_wrappers(normalised(name, is_parameter=False))


def aligned(left: np.ndarray, right: np.ndarray) -> np.ndarray | None:
    """The right array in the shape of the left one, if adjacent axes of one are merged in the other; else None."""
    if left.shape == right.shape:
        return right
    if left.size != right.size:
        return None
    i = j = 0
    while i < left.ndim or j < right.ndim:
        a = left.shape[i] if i < left.ndim else 1
        b = right.shape[j] if j < right.ndim else 1
        i, j = i + 1, j + 1
        while a != b:
            if a < b and i < left.ndim:
                a, i = a * left.shape[i], i + 1
            elif b < a and j < right.ndim:
                b, j = b * right.shape[j], j + 1
            else:
                return None
    return right.reshape(left.shape)


def transformed(match: Match, array: np.ndarray) -> np.ndarray:
    """The right array of a match in the left layout, in float64."""
    return match.transform(array).astype(np.float64)

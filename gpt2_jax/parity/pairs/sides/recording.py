"""Record the input and the output of every module of a forward pass, and where a pass was when it failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from gpt2_jax.parity.pairs.matching.layouts import Layout
from gpt2_jax.parity.pairs.sides.side import OUTPUT

IsArray = Callable[[Any], bool]


def named_leaves(name: str, value: Any, is_array: IsArray) -> Iterator[tuple[str, Any]]:
    """Yield the arrays of nested tuples, lists, mappings and dataclasses. Anything else is left out.

    >>> dict(named_leaves("cell", (1, {"h": 2}), lambda x: isinstance(x, int)))
    {'cell[0]': 1, 'cell[1].h': 2}
    """
    if is_array(value):
        yield name, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from named_leaves(f"{name}.{key}", each, is_array)
    elif isinstance(value, tuple) and (names := getattr(value, "_fields", None)):
        yield from named_leaves(name, dict(zip(names, value, strict=True)), is_array)
    elif isinstance(value, tuple | list):
        for k, each in enumerate(value):
            yield from named_leaves(f"{name}[{k}]", each, is_array)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from named_leaves(name, {f.name: getattr(value, f.name) for f in fields(value)}, is_array)


def named_outputs(value: Any, is_array: IsArray) -> dict[str, Any]:
    """The outputs of a model by name: `output`, `output[0]`, or the keys of a dictionary."""
    is_mapping = isinstance(value, Mapping)
    prefix = f"{OUTPUT}." if is_mapping or is_dataclass(value) or hasattr(value, "_fields") else ""
    return {name.removeprefix(prefix): leaf for name, leaf in named_leaves(OUTPUT, value, is_array)}


class Recorder:
    """The arrays that pass into and out of modules, in the order of the forward pass."""

    def __init__(self, is_array: IsArray, keep: Callable[[Any], Any] = lambda array: array) -> None:
        """`keep` copies an array that a later operation may change in place."""
        self.values: dict[str, Any] = {}
        self.layouts: dict[str, Layout] = {}
        self.training: dict[str, str] = {}
        """Module -> its kind, for modules in training mode."""
        self._is_array, self._keep = is_array, keep
        self._running: list[str] = []
        self._calls: Counter[str] = Counter()

    @property
    def place(self) -> str:
        """The innermost module that is running, or that was running when the pass failed."""
        return self._running[-1] if self._running else ""

    def enter(self, module: str, args: tuple[Any, ...]) -> None:
        """Record the first argument of a module's call. A second call of the same module is `NAME#2`."""
        self._calls[module] += 1
        name = module if self._calls[module] == 1 else f"{module}#{self._calls[module]}"
        self._running.append(name)
        if args:
            self._record(f"{name}:input", args[0])

    def leave(self, output: Any) -> None:
        """Record the output of the innermost running module."""
        self._record(self._running.pop(), output)

    def _record(self, name: str, value: Any) -> None:
        for each, array in named_leaves(name, value, self._is_array):
            self.values[each] = self._keep(array)

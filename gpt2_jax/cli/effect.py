"""Raise an error for flags that have no effect. Each verb has rules that state when a flag has no effect.

A flag counts as given if its value differs from the default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bridge import BridgeError

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """A condition under which some flags have no effect."""

    names: tuple[str, ...]
    """The parameter names of the flags."""
    applies: Callable[[Values], bool]
    """The condition, as a function of the values of all flags."""
    when: str
    """The condition in words. The message inserts it after "has no effect"."""


OVERWRITE = Rule(("overwrite",), lambda values: values["json"] is None, "without --json")
"""For verbs in which `--overwrite` affects only the report."""


def require_effect(values: Values, defaults: Values, rules: Iterable[Rule]) -> None:
    """Raise `BridgeError` that names every given flag that has no effect."""
    problems = [
        f"{flag(name)}: has no effect {rule.when}; leave it out"
        for rule in rules
        if rule.applies(values)
        for name in rule.names
        if values[name] != defaults[name]
    ]
    if problems:
        raise BridgeError("\n".join(problems))


def flag(name: str) -> str:
    """Return the command-line flag of a parameter."""
    return f"--{name.replace('_', '-')}"


def defaults_of(verb: Callable[..., Any]) -> Values:
    """Return the defaults of a verb's parameters."""
    return {name: parameter.default for name, parameter in inspect.signature(verb).parameters.items()}

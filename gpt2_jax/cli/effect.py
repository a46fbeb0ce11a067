"""A flag that was given and would have no effect is an error.

That a flag was given is known by its value: it is not the default. A verb has a table of rules and checks it first.
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
    """When these flags, by the names of their parameters, have no effect."""

    names: tuple[str, ...]
    applies: Callable[[Values], bool]
    """Given the values of all flags."""
    when: str
    """The same in words, after "has no effect"."""


def require_effect(values: Values, defaults: Values, rules: Iterable[Rule]) -> None:
    """Raise `BridgeError` naming every flag that is not at its default and has no effect."""
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
    """How the command line spells a parameter."""
    return f"--{name.replace('_', '-')}"


def defaults_of(verb: Callable[..., Any]) -> Values:
    """The defaults of a verb's parameters."""
    return {name: parameter.default for name, parameter in inspect.signature(verb).parameters.items()}

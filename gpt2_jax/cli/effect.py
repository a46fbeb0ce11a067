"""Flags without an effect are an error: each verb has a table of rules that say when a flag has none.

A flag counts as given if its value is not the default.
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
    """The parameters of the flags."""
    applies: Callable[[Values], bool]
    """The condition, a function of the values of all flags."""
    when: str
    """The condition in words, to follow "has no effect"."""


def require_effect(values: Values, defaults: Values, rules: Iterable[Rule]) -> None:
    """Raise `BridgeError` naming every flag that was given and has no effect."""
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

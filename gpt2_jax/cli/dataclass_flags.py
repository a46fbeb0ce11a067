"""Flags of the command from the fields of a dataclass. The help of a flag is the docstring of its field."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, get_origin, get_type_hints

from tyro.conf import arg

from gpt2_jax.cli.parsing import NONE


def flags_of(part: type, names: Sequence[str], metavars: Mapping[str, str] | None = None) -> list[tuple[str, Any]]:
    """Return the names and annotated types of some fields, for `dataclasses.make_dataclass`.

    tyro reads field docstrings, too, but keeps their line breaks.
    """
    types, docs, metavars = get_type_hints(part), docs_of(part), metavars or {}

    def annotated(name: str) -> Any:
        # The default of a flag with several values may be empty, and tyro would show "(default: )".
        hint = (lambda default: f"(default: {default or NONE})") if get_origin(types[name]) is tuple else None
        return Annotated[types[name], arg(help=docs[name], metavar=metavars.get(name), help_behavior_hint=hint)]

    return [(name, annotated(name)) for name in names]


def docs_of(part: type) -> dict[str, str]:
    """Return the docstring of each field of a dataclass, in one line."""
    [definition] = ast.parse(inspect.getsource(part)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        statement.target.id: " ".join(following.value.value.split())
        for statement, following in pairwise(definition.body)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
        and isinstance(following.value.value, str)
    }

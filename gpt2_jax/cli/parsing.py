"""Parsing of flags, and layout of their help."""

from __future__ import annotations

import functools
import inspect
import io
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from types import NoneType, UnionType
from typing import Any, TextIO, Union, get_args

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)

from bridge.errors import escaped

NONE = "none"
"""The spelling of the value None on the command line and in the help. `None` is accepted too."""

REGISTRY = ConstructorRegistry()


@REGISTRY.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Parse `X | None` as X or none. The help shows the metavar of X alone."""
    options = get_args(info.type)
    if info.type_origin not in (Union, UnionType) or len(options) != 2 or NoneType not in options:
        return None
    [other] = (option for option in options if option is not NoneType)
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(other, info.markers))
    if isinstance(spec, UnsupportedTypeAnnotationError):
        return None
    return replace(
        spec,
        instance_from_str=lambda words: None if words in (["none"], ["None"]) else spec.instance_from_str(words),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: [NONE] if value is None else spec.str_from_instance(value),
        choices=None if spec.choices is None else (NONE, "None", *spec.choices),
    )


@REGISTRY.primitive_rule
def _text(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[str] | None:
    """Show control characters in defaults as escapes: the defaults of a resumed run come from a file."""
    if info.type is not str:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="TEXT",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [escaped(value, keep="")],
    )


def parse_and_run(verb: Callable[..., Any], name: str, words: Sequence[str]) -> Any:
    """Parse the words after `gpt2 NAME`, call the verb, and return its result. A parse error exits with status 2."""

    @functools.wraps(unwrap_help(verb))
    def bound(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return functools.partial(verb, *args, **kwargs)

    with redirect_stdout(_WrappedParagraphs(sys.stdout)):
        call = tyro.cli(bound, prog=f"gpt2 {name}", args=words, registry=REGISTRY)
    return call()


class _WrappedParagraphs(io.TextIOBase):
    """Standard output for the help. Wraps the paragraphs above the boxes, which tyro prints as one line each."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        width = shutil.get_terminal_size().columns
        lines = (textwrap.fill(line, width) if line[:1].isalpha() else line for line in text.split("\n"))
        return self._stream.write("\n".join(lines))

    def isatty(self) -> bool:  # tyro prints colours on a terminal
        return self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # tyro draws boxes in UTF-8
        return self._stream.encoding


def unwrap_help(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Return the verb with each entry under `Args:` in one line, so that the help wraps it at the terminal's width."""
    function = inspect.unwrap(verb)  # tyro reads the docstring of the innermost function
    function.__doc__ = verb.__doc__ = re.sub(r"\n {8,}(?=\S)", " ", inspect.getdoc(function) or "")
    return verb

"""Parse untrusted JSON: return an object, or raise a `BridgeError` that names the file."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any, NoReturn

from bridge.errors import BridgeError, quoted

_MOST_DEPTH = 32
_SURROGATE = re.compile("[\ud800-\udfff]")
_MOST_DIGITS = 40  # of an integer; 2^64 has 20


def parse_object(text: bytes, where: str, error: type[BridgeError]) -> dict[str, Any]:
    """Return the object in `text`. Raises `error`, with `where` as a prefix, for anything else.

    Duplicate names are rejected, because parsers differ in which value they keep.
    """
    return _parsed(text, where, error)


def parse_plain_object(text: bytes, where: str, error: type[BridgeError], most_elements: int) -> dict[str, Any]:
    """Like `parse_object`, for an object that is written to another file later.

    Also rejects NaN, infinity, numbers beyond a float's range, lone surrogates, and values nested more than 32 deep,
    because other programs cannot read them.

    Args:
        most_elements: the limit of `require_few_elements`, which is checked first.
    """
    require_few_elements(text, where, error, most_elements)
    value = _parsed(text, where, error, parse_constant=_no_constant, parse_float=_finite, parse_int=_whole_number)
    try:
        _require_shallow_text(value, _MOST_DEPTH)
    except ValueError as problem:
        raise error(f"{where}: {problem}") from None
    return value


def require_few_elements(text: bytes, where: str, error: type[BridgeError], most_elements: int) -> None:
    """Raise `error` for JSON with more separators and brackets than a limit. The text is not parsed.

    At most a quarter of the limit may be brackets. Characters inside strings count too, so limits must be far above the
    counts in real files.
    """
    containers = text.count(b"[") + text.count(b"{")
    if containers > most_elements // 4 or containers + text.count(b",") + text.count(b":") > most_elements:
        raise error(f"{where} holds more than {most_elements} values, or {most_elements // 4} lists and objects")


def _parsed(text: bytes, where: str, error: type[BridgeError], **hooks: Any) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates, **hooks)
    except (ValueError, RecursionError) as problem:
        raise error(f"{where} is not valid JSON: {quoted(problem)}") from None
    if not isinstance(value, dict):
        raise error(f"{where} must hold an object, not {type(value).__name__}")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"the name {quoted(counts.most_common(1)[0][0])} appears twice")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {quoted(digits)} is too large")
    return value


def _whole_number(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"the number {quoted(digits)} is too large")
    return int(digits)


def _require_shallow_text(value: Any, depth: int) -> None:
    """Raise `ValueError` for containers nested deeper than `depth`, and for text that UTF-8 cannot encode."""
    if isinstance(value, str):
        if not value.isascii() and _SURROGATE.search(value):
            raise ValueError(f"{quoted(value)} contains a lone surrogate")
    elif isinstance(value, dict | list):
        if not depth:
            raise ValueError(f"nested more than {_MOST_DEPTH} deep")
        for element in value:
            _require_shallow_text(element, depth - 1)
        if isinstance(value, dict):
            for element in value.values():
                _require_shallow_text(element, depth - 1)

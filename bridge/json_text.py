"""JSON from somebody else: an object, or an error of this project's that says where."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from bridge.errors import BridgeError, quoted


def parse_object(text: bytes, where: str, error: type[BridgeError]) -> dict[str, Any]:
    """The object that `text` holds; `error`, with `where` in front, for anything else.

    A name that appears twice is refused: readers differ in which of the two they believe.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
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

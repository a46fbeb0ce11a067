"""Damage to the structure of JSON: unexpected values, and names that are dropped, duplicated or swapped."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Raw:
    """JSON text that `json.dumps` does not write."""

    text: str


HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 256, 2**31, 2**32 - 1, 2**63, 2**70, 0.5, -0.0, 1e308),
    *(
        "",
        "a",
        "7",
        "the",
        "<|endoftext|>",
        "\x1b[31m",
        "../../x",
        "\u0120",
        "e" * 300,
        "x" * 2**16,
        "\u00e9\U0001f642",
    ),
    *([], {}, ["a"], [[]], {"a": 1}, {"": ""}, [None], [1, 2, 3]),
    *map(Raw, ("1e999", "-1e999", "NaN", "Infinity", '"\\ud800"', "1" + 400 * "0", 5000 * "9", 200 * "[" + 200 * "]")),
)


def damaged_json(content: bytes, rng: random.Random) -> bytes:
    """Return `content` with one to three changes."""
    value = _mutable(json.loads(content))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change(value, rng)
    return "".join(_rendered(value)).encode("utf-8", "surrogatepass")


def _change(value: Any, rng: random.Random) -> None:
    """Change one entry of a container, or of a container in it."""
    while True:
        entries = value.entries
        if not entries:
            entries.append(_entry("a", rng.choice(HOSTILE)))
            return
        at = rng.randrange(len(entries))
        inner = entries[at][1]
        if not isinstance(inner, _Container) or rng.random() < 0.25:
            break
        value = inner
    name, old = entries[at]
    other = rng.randrange(len(entries))
    match rng.randrange(9):
        case 0 | 1 | 2:
            entries[at] = (name, rng.choice(HOSTILE))
        case 3:
            del entries[at]
        case 4:
            entries.insert(other, (name, old))
        case 5:
            entries[at], entries[other] = (name, entries[other][1]), (entries[other][0], old)
        case 6:
            entries[at] = (rng.choice([str(text) for text in HOSTILE if isinstance(text, str)]), old)
        case 7:
            entries[at], entries[other] = entries[other], entries[at]
        case _:
            entries[at] = (name, _near(old, rng))


def _near(old: Any, rng: random.Random) -> Any:
    """Return a value that differs slightly from `old`, or only in its type."""
    if isinstance(old, bool) or old is None:
        return rng.choice((True, False, 0, 1, None))
    if isinstance(old, int | float):
        return rng.choice((old + 1, old - 1, -old, float(old), str(old), [old]))
    if isinstance(old, str):
        return rng.choice((old + "a", old[1:], old[::-1], old.upper(), [old], old + " ", " " + old))
    return rng.choice(([], {}, None, "a"))


class _Container:
    def __init__(self, is_object: bool, entries: list[tuple[str, Any]]) -> None:
        self.is_object, self.entries = is_object, entries


def _entry(name: str, value: Any) -> tuple[str, Any]:
    return name, value


def _mutable(value: Any) -> Any:
    if isinstance(value, dict):
        return _Container(True, [(name, _mutable(inner)) for name, inner in value.items()])
    if isinstance(value, list):
        return _Container(False, [("a", _mutable(inner)) for inner in value])
    return value


def _rendered(value: Any) -> Iterator[str]:
    if isinstance(value, Raw):
        yield value.text
    elif isinstance(value, _Container):
        yield "{" if value.is_object else "["
        for number, (name, inner) in enumerate(value.entries):
            yield ("," if number else "") + (json.dumps(name) + ":" if value.is_object else "")
            yield from _rendered(inner)
        yield "}" if value.is_object else "]"
    else:
        yield json.dumps(value)

"""Difficult strings for tokenizers, generated from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from support.tokenizers_for_tests import CORPUS, TEXTS

_WORDS = [
    *[
        "the",
        "quick",
        "brown",
        "dog",
        "cat",
        "cats",
        "dogs",
        "unknown",
        "hello",
        "don't",
        "they'll",
        "12",
        "3.14",
        "привет",
        "déjà",
        "日本語",
        "我爱北京",
        "天气",
    ],
    "ﬁ",
]
_SPACES = [
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\u2028",
    "\u200b",
    "\ufeff",
    "\x85",
]
_PUNCTUATION = [
    *".,!?'\"-_()[]{}<>|/\\@#$%^&*+=~`:;",
    "...",
    "n't",
    " 's",
    "\x00",
    "\x1c",
    "\x7f",
    "\u0301",
    "\u200d",
    "\ufe0f",
]
_SOUTH, _LAST = 0xD800, 0x110000


def generated(count: int, seed: int, markers: Sequence[str]) -> Iterator[str]:
    """Yield `count` strings: the texts that all tests use, then random ones.

    Args:
        markers: the added tokens, which the random strings contain whole, in part and next to each other.
    """
    fixed = [*TEXTS, *CORPUS[:3], *markers, "".join(markers), " ".join(markers), " " * 3000, "x" * 3000, "é" * 999]
    yield from fixed[:count]
    draw = random.Random(seed)
    for _ in range(count - len(fixed)):
        yield _string(draw, markers)


def _string(draw: random.Random, markers: Sequence[str]) -> str:
    length = draw.choice((0, 1, 2, 3, 5, 8, 13, 21, 34)) if draw.random() < 0.995 else 3000
    return "".join(_piece(draw, markers) for _ in range(length))


def _piece(draw: random.Random, markers: Sequence[str]) -> str:
    match draw.randrange(7):
        case 0:
            return draw.choice(_SPACES)
        case 1:
            return draw.choice(_PUNCTUATION)
        case 2 if markers:
            marker = draw.choice(markers)
            return marker if draw.random() < 0.7 else marker[: draw.randrange(len(marker) + 1)]
        case 3:  # any plane of Unicode
            code = draw.randrange(_LAST)
            return chr(code) if not _SOUTH <= code < 0xE000 else "\ufffd"
        case 4:
            return chr(draw.choice((draw.randrange(0x80), draw.randrange(0x800), draw.randrange(0x2000, 0x3100))))
        case 5:
            return draw.choice(_WORDS).upper()
    return draw.choice(_WORDS)

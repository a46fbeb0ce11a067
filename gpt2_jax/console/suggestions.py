"""Suggestions for misspelt words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a message that names the known word closest to `word`, or an empty string.

    >>> did_you_mean("inspekt", ["inspect", "convert"])
    '; did you mean inspect?'
    """
    close = difflib.get_close_matches(word, [*known], n=1)
    return f"; did you mean {close[0]}?" if close else ""

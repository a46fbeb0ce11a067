"""Lone surrogates, which UTF-8 cannot encode."""

from __future__ import annotations


def without_lone_surrogates(text: str) -> str:
    """Return the text with U+FFFD in place of each lone surrogate, as tiktoken encodes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text

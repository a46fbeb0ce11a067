"""Description of the first difference between two sequences of token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bridge.errors import quoted

Ids = Sequence[int]


def no_token(id: int) -> None:
    """The spelling of an id without a tokenizer."""


@dataclass(frozen=True)
class Reader:
    """The source of ids, for the description of a difference: a tokenizer, or the program that generated them."""

    name: str
    token_of: Callable[[int], str | None] = no_token

    def at(self, ids: Ids, position: int) -> str:
        """Describe the token at a position: its id and its spelling."""
        if position >= len(ids):
            return f"the end in {self.name}"
        token = self.token_of(ids[position])
        return f"{ids[position]}{'' if token is None else ' ' + quoted(token, 40)} in {self.name}"


def first_difference(text: str, expected: Ids, actual: Ids, readers: tuple[Reader, Reader]) -> str:
    """Describe where ids differ: the text, the first position, and both ids with their tokens.

    >>> first_difference("a b", [5, 7], [5], (Reader("transformers"), Reader("this project")))
    "'a b': token 1 is 7 in transformers, the end in this project"
    """
    pairs = enumerate(zip(expected, actual, strict=False))
    position = next((k for k, (a, b) in pairs if a != b), min(len(expected), len(actual)))
    return f"{quoted(text)}: token {position} is {readers[0].at(expected, position)}, {readers[1].at(actual, position)}"

"""The comparison of tokenizers: their kind, their tokens, and the ids of difficult strings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bridge.checkpoint import Checkpoint
from bridge.comparison.settings import Difference, compare_fields
from bridge.comparison.strings import difficult_strings, encodable
from bridge.comparison.token_ids import Reader, first_difference
from bridge.errors import NoTokenizerError, TokenizerError, quoted
from bridge.tokenizers.tokenizer import AddedToken, Tokenizer


@dataclass(frozen=True)
class TokenizerComparison:
    """How two tokenizers differ."""

    tokenizers: tuple[Tokenizer, Tokenizer] | None
    """Both tokenizers, or None if a side has none."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """The sides without a tokenizer, "A" or "B", and the reason for each."""
    differences: tuple[Difference, ...] = ()
    """Kind, vocabulary size, special tokens by role, and added tokens, if they differ. A name may contain any text."""
    is_same_definition: bool = True
    """Whether everything that determines the ids is equal. If so, strings are not compared."""
    different_tokens: tuple[tuple[int, int], ...] = ()
    """Ranges [start, stop) of ids with different tokens."""
    strings: int = 0
    """The number of difficult strings that were compared."""
    different_strings: tuple[str, ...] = ()
    """One sentence for each string whose ids differ: the string, and the first token that differs."""

    @property
    def is_different(self) -> bool:
        return not self.is_same_definition or any(difference.matters for difference in self.differences)


def compare_tokenizers(a: Checkpoint, b: Checkpoint) -> TokenizerComparison:
    """Compare the tokenizers of two checkpoints.

    Raises `TokenizerError` if the files of a tokenizer are damaged or not supported.
    """
    found, missing = [], {}
    for side, checkpoint in (("A", a), ("B", b)):
        try:
            found.append(checkpoint.tokenizer())
        except NoTokenizerError as reason:
            missing[side] = str(reason)
    if missing:
        return TokenizerComparison(None, missing)
    first, second = found
    differences = (
        *compare_fields(_facts(first), _facts(second), "text"),
        *compare_fields(_unknown_token(first), _unknown_token(second), "none"),
    )
    if first.fingerprint == second.fingerprint:
        return TokenizerComparison((first, second), differences=differences)
    strings = difficult_strings([*first.added, *second.added])
    return TokenizerComparison(
        (first, second),
        differences=differences,
        is_same_definition=False,
        different_tokens=ranges(_different_tokens(first, second)),
        strings=len(strings),
        different_strings=tuple(filter(None, (_difference_of_ids(text, first, second) for text in strings))),
    )


def ranges(numbers: Iterator[int]) -> tuple[tuple[int, int], ...]:
    """Return increasing numbers as ranges [start, stop).

    >>> ranges(iter([1, 2, 3, 7]))
    ((1, 4), (7, 8))
    """
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return tuple(found)


def _facts(tokenizer: Tokenizer) -> Mapping[str, Any]:
    roles = {role: token for role, token in tokenizer.special.by_role().items() if role != "unk"}
    special = {f"{role} token": [token, tokenizer.id_of(token)] for role, token in roles.items()}
    added = {f"added token {token.content}": _described(token) for token in tokenizer.added.values()}
    return {"kind": tokenizer.kind, "vocabulary size": tokenizer.vocab_size, **special, **added}


def _unknown_token(tokenizer: Tokenizer) -> Mapping[str, Any]:
    """Return the role of the unknown token. Its effect on ids is part of the fingerprint."""
    token = tokenizer.special.unk
    return {} if token is None else {"unk token": [token, tokenizer.id_of(token)]}


def _described(token: AddedToken) -> str:
    """Return the id and the flags of an added token."""
    flags = [name for name, value in vars(token).items() if value is True]
    return ", ".join([f"id {token.id}", *flags])


def _different_tokens(a: Tokenizer, b: Tokenizer) -> Iterator[int]:
    return (i for i in range(max(a.vocab_size, b.vocab_size)) if a.token_of(i) != b.token_of(i))


def _difference_of_ids(text: str, a: Tokenizer, b: Tokenizer) -> str | None:
    """Describe where the ids of a text differ. None if they are equal, or if neither tokenizer can encode it."""
    ids = [_ids(text, tokenizer) for tokenizer in (a, b)]
    if ids[0] == ids[1]:
        return None
    if None in ids:
        return f"{quoted(text)}: {'A' if ids[0] is None else 'B'} cannot encode it"
    return first_difference(text, ids[0] or (), ids[1] or (), (Reader("A", a.token_of), Reader("B", b.token_of)))


def _ids(text: str, tokenizer: Tokenizer) -> list[int] | None:
    """Return the ids of a text, or None if the tokenizer cannot encode it, for example a byte without a token."""
    try:
        return tokenizer.encode(encodable(text, tokenizer))
    except TokenizerError:
        return None

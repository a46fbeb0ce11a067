"""Validation of tokenizer files before a library builds a tokenizer from them.

The libraries are written in Rust. Unexpected input makes them panic, loop forever or allocate gigabytes. These checks
take parsed values and depend on no library. Each raises `TokenizerError` with `where` as a prefix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bridge.errors import TokenizerError, quoted

MOST_ADDED_TOKENS = 2**14
"""Limit on the number of added tokens. The `tokenizers` package takes time O(n^2) to add n of them."""
MOST_SPECIAL_BYTES = 2**19
"""Limit on the total UTF-8 bytes of all added tokens, which are compiled into one automaton."""
LONGEST_SPECIAL = 2**9
"""Limit on the UTF-8 bytes of one special token. Searching a text for it can take time O(len(token) * len(text))."""


def require_distinct_ids(tokens: Mapping[str, int], where: str) -> None:
    """Require that every token is a string with a unique id below 2^31."""
    seen: dict[int, str] = {}
    for token, i in tokens.items():
        if not isinstance(token, str):
            raise TokenizerError(f"{where}: the token {quoted(token)} is not a string")
        if type(i) is not int or not 0 <= i < 2**31:
            raise TokenizerError(f"{where}: the id of {quoted(token)} is {quoted(i)}, not an integer below 2^31")
        if i in seen:
            raise TokenizerError(f"{where}: {quoted(seen[i])} and {quoted(token)} have the same id, {i}")
        seen[i] = token


def require_ids_below(rows: int, largest: int, where: str) -> None:
    """Require that the model's vocabulary has a row for the largest id."""
    if largest >= rows:
        raise TokenizerError(
            f"the tokenizer of {where} has ids up to {largest}, but the model's vocabulary has only {rows}; either the "
            "tokenizer belongs to another model, or tokens were added and the model was not resized "
            f"(bridge.resize_vocabulary(checkpoint, {largest + 1}))"
        )


def require_special_tokens(special: Mapping[str, int], vocab: Mapping[str, int], where: str) -> None:
    """Require that each special token is not empty, is within the size limits, and has no other id in `vocab`."""
    if len(special) > MOST_ADDED_TOKENS:
        raise TokenizerError(f"{where}: there are {len(special)} added tokens; the limit is {MOST_ADDED_TOKENS}")
    for token, i in special.items():
        if not token:
            raise TokenizerError(f"{where}: a special token is empty")
        if vocab.get(token, i) != i:
            raise TokenizerError(
                f"{where}: the added token {quoted(token)} has the id {i}, but the id {vocab[token]} in the vocabulary"
            )
    try:
        sizes = {token: len(token.encode("utf-8")) for token in special}
    except UnicodeEncodeError as error:
        raise TokenizerError(f"{where}: the special token {quoted(error.object)} cannot be encoded as UTF-8") from None
    for token, size in sizes.items():
        if size > LONGEST_SPECIAL:
            raise TokenizerError(
                f"{where}: the special token {quoted(token)} has {size} bytes; the limit is {LONGEST_SPECIAL}"
            )
    if sum(sizes.values()) > MOST_SPECIAL_BYTES:
        raise TokenizerError(
            f"{where}: the {len(special)} added tokens have {sum(sizes.values())} bytes; "
            f"the limit is {MOST_SPECIAL_BYTES}"
        )


def flag_of(settings: Mapping[str, Any], name: str, default: bool | None, where: str) -> bool | None:
    """Return a flag of `tokenizer_config.json`. Raises unless it is true or false, or null if `default` is None."""
    value = settings.get(name, default)
    if not (isinstance(value, bool) or (value is None and default is None)):
        raise TokenizerError(f"{where}: {name}={quoted(value)} is not true or false")
    return value


def pairs_of(merges: Iterable[Sequence[Any]], where: str) -> list[tuple[str, str]]:
    """Return the merges. Raises if one is not a pair of strings."""
    pairs = []
    for merge in merges:
        if len(merge) != 2 or not all(isinstance(part, str) and part for part in merge):
            raise TokenizerError(f"{where}: the merge {quoted(merge)} is not a pair of tokens")
        pairs.append((merge[0], merge[1]))
    return pairs


def require_bpe_model(model: Mapping[str, Any], where: str) -> None:
    """Require that a BPE model in a `tokenizer.json` gives the same ids for the same text every time."""
    if model.get("dropout"):
        raise TokenizerError(
            f"{where}: dropout={quoted(model['dropout'])} leaves out random merges, so the ids change from call to "
            "call; set it to null"
        )


def require_unigram_vocabulary(vocab: Any, where: str) -> None:
    """Require that the vocabulary of a Unigram model is a list of different pieces, each with its score."""
    if not isinstance(vocab, list) or not vocab:
        raise TokenizerError(f"{where} is not a valid tokenizer.json: model.vocab is not a list of pieces")
    for entry in vocab:
        match entry:
            case [str(), int() | float()] if not isinstance(entry[1], bool):
                continue
        raise TokenizerError(f"{where}: {quoted(entry)} is not a piece with its score")
    if len({piece for piece, _ in vocab}) < len(vocab):
        raise TokenizerError(f"{where}: the vocabulary has a piece twice")


def require_merges_reached(merges: Sequence[tuple[str, str]], where: str) -> None:
    """Require that BPE produces every token from the two parts that its merge names.

    tiktoken joins any two neighbours that spell a token; `tokenizers` joins only pairs that a merge names. Both give
    the same ids if no earlier merge separates the two parts.

    Source of the method: `is_valid_token_pair` in github.com/github/rust-gems, crates/bpe.
    """
    rank_of = {pair: rank for rank, pair in enumerate(merges)}
    made_of = {first + second: (rank, first, second) for rank, (first, second) in enumerate(merges)}
    for rank, pair in enumerate(merges):
        if not _are_neighbours(*pair, rank, rank_of, made_of):
            raise TokenizerError(
                f"{where}: an earlier merge separates the parts of the merge {quoted(' '.join(pair))}, so BPE never "
                "produces its token; the merges are damaged or in the wrong order"
            )


def _are_neighbours(
    first: str,
    second: str,
    limit: int,
    rank_of: Mapping[tuple[str, str], int],
    made_of: Mapping[str, tuple[int, str, str]],
) -> bool:
    """Whether `first` and `second` stay adjacent: BPE applies no merge across their border before joining them.

    The loop undoes the merges at the border, latest first. A merge across the border whose rank is below `limit` would
    have been applied before the merge that was undone last.
    """
    byte = (-1, "", "")
    while rank_of.get((first, second), limit) >= limit:
        first_rank, _, first_end = made_of.get(first, byte)
        second_rank, second_start, _ = made_of.get(second, byte)
        if first_rank == second_rank == -1:
            return True
        if first_rank > second_rank:
            first, limit = first_end, first_rank
        else:  # among merges of equal rank, BPE applies the leftmost first, here the one across the border
            second, limit = second_start, second_rank + 1
    return False

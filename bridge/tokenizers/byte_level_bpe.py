"""Byte-level BPE (Radford et al. 2019, section 2.2): conversion of vocabulary and merges to and from tiktoken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from bridge.errors import TokenizerError, quoted
from bridge.tokenizers.validation import pairs_of, require_distinct_ids, require_merges_reached, require_special_tokens

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
"""The token between documents in GPT-2's training data."""

WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""GPT-2's pre-tokenizer: the pattern of the words that BPE encodes."""

SPELLINGS_OF_WORDS = (
    WORDS,
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",  # OpenAI's encoder.py
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",  # tiktoken since 0.8
)
"""Patterns that split every text into the same words."""


def byte_level_bpe(
    name: str,
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, ...]],
    special: Mapping[str, int],
    where: str,
) -> tiktoken.Encoding:
    """Return the tokenizer of a vocabulary and merges that spell bytes as printable characters.

    Tokens that are neither bytes nor merges are special tokens, like those in `special`.

    Raises `TokenizerError`, with `where` as a prefix, for input that tiktoken would encode differently or panic on.
    """
    import tiktoken

    byte_of = printable_bytes()
    pairs = pairs_of(merges, where)
    require_distinct_ids(vocab, where)
    require_distinct_ids({**vocab, **special}, where)
    merged = ["".join(pair) for pair in pairs]
    ordinary = set(merged) | set(byte_of)
    for pair, token in zip(pairs, merged, strict=True):
        if unknown := [part for part in (*pair, token) if part not in ordinary or part not in vocab]:
            raise TokenizerError(
                f"{where}: the merge {quoted(' '.join(pair))} uses {quoted(unknown[0])}, which has no id "
                "or does not consist of bytes or merges; only byte-level BPE is supported"
            )
    # tiktoken ranks a merge by the id of the token that it produces.
    if any(later <= earlier for earlier, later in pairwise(vocab[token] for token in merged)):
        raise TokenizerError(f"{where}: token ids do not follow the order of the merges, which tiktoken requires")
    require_merges_reached(pairs, where)
    ranks = {bytes(byte_of[c] for c in token): i for token, i in vocab.items() if token in ordinary}
    require_all_bytes(ranks, where)
    special = {**{token: i for token, i in vocab.items() if token not in ordinary}, **special}
    require_special_tokens(special, vocab, where)
    return tiktoken.Encoding(name=name, pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special)


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the pair that produces each token, in the order of the merges.

    The pair is the result of BPE on the token's bytes with all earlier merges. Raises `TokenizerError` if that result
    is not two tokens, because then no merge can produce the token.
    """
    merges = []
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__):
        parts = _merged_below(ranks[token], token, ranks)
        if len(parts) != 2 or any(part not in ranks for part in parts):
            raise TokenizerError(
                f"the token {quoted(token)} is not a merge of two tokens that come before it, so neither "
                "merges.txt nor tokenizer.json can hold this tokenizer"
            )
        merges.append((parts[0], parts[1]))
    return merges


def _merged_below(limit: int, token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """Apply BPE to the bytes of `token` with the merges whose rank is below `limit`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        rank, at = min((ranks.get(a + b, limit), at) for at, (a, b) in enumerate(pairwise(parts)))
        if rank >= limit:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def printable_bytes() -> dict[str, int]:
    """Return character -> byte. Printable bytes are their own characters; the others have characters from 256 on.

    Source: `bytes_to_unicode` in OpenAI's gpt-2/src/encoder.py, rewritten.
    """
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + k): b for k, b in enumerate(others)}


def require_all_bytes(ranks: Mapping[bytes, int], where: str) -> None:
    """Require a token for every byte. tiktoken panics on text with a byte that has no token."""
    if len([token for token in ranks if len(token) == 1]) != 256:
        raise TokenizerError(f"{where}: some of the 256 bytes have no token, so not every text can be encoded")

"""Byte-level BPE (Radford et al. 2019, section 2.2), encoded by tiktoken."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bridge.errors import TokenizerError, quoted
from bridge.tokenizers.chat.encoding import Parts
from bridge.tokenizers.engines import AddedTokenSplitter
from bridge.tokenizers.post_processors import around_template
from bridge.tokenizers.streams import StreamOfBytes, TextStream
from bridge.tokenizers.tokenizer import AddedToken, SpecialTokens, Tokenizer, tokenizer_json
from bridge.tokenizers.validation import require_merges_reached

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

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
"""GPT-2's pre-tokenizer and decoder in a `tokenizer.json`."""

_FEW_ADDED = 64
"""Up to this number of added tokens, searching with regular expressions is faster than with `tokenizers`."""

_LONGEST_SPACE = 2**16
"""With `WORDS`, tiktoken's stack overflows on 131,071 white-space characters. The pattern of tiktoken's own GPT-2
matches any number of them at the end of a text, but is slower by a sixth on all text."""
_SPACES = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")  # Unicode's White_Space


class ByteLevelBPE(Tokenizer):
    """Byte-level BPE with GPT-2's pre-tokenizer. Its added tokens do not strip white space."""

    def __init__(
        self,
        name: str,
        ranks: Mapping[bytes, int],
        added: Iterable[AddedToken] = (),
        special: SpecialTokens | None = None,
        source: Path | None = None,
        *,
        unused: Mapping[str, int] | None = None,
        around: tuple[Sequence[int], Sequence[int]] = ((), ()),
        add_prefix_space: bool = False,
        merges: Sequence[tuple[bytes, bytes]] | None = None,
        encoding: tiktoken.Encoding | None = None,
    ) -> None:
        """
        Args:
            ranks: bytes of an ordinary token -> id. tiktoken merges in the order of the ids.
            added: the added tokens. None of them may have `lstrip`, `rstrip` or `single_word`.
            unused: further tokens of the vocabulary. No text is encoded to them.
            around: the ids that `add_special_tokens` puts before and after every text.
            add_prefix_space: insert a space before text that does not start with one.
            merges: the merges in order, if they are known. Otherwise `merges_of` computes them when they are needed.
            encoding: a `tiktoken.Encoding` with these ranks, if there is one. Its pattern is used.
        """
        super().__init__(name, added, special, source)
        self.kind = "byte-level BPE" if any(len(token) > 1 for token in ranks) else "bytes"
        self.ranks: Mapping[bytes, int] = ranks
        self.unused: Mapping[str, int] = unused or {}
        self.around: tuple[Sequence[int], Sequence[int]] = around
        self.add_prefix_space: bool = add_prefix_space
        self._given, self._merges = encoding, merges
        self._passes = [
            [token.content for token in self.added.values() if token.normalized is normalized]
            for normalized in (False, True)
        ]
        self._patterns = [_any_of(contents) if len(self.added) <= _FEW_ADDED else None for contents in self._passes]

    @classmethod
    def from_tiktoken(cls, encoding: tiktoken.Encoding) -> ByteLevelBPE:
        """Return the tokenizer of a `tiktoken.Encoding`. `<|endoftext|>`, if present, is the end-of-sequence token."""
        added = [AddedToken(token, i) for token, i in encoding._special_tokens.items()]
        end = END_OF_TEXT if END_OF_TEXT in encoding._special_tokens else None
        special = SpecialTokens(end, end, additional=tuple(t for t in encoding._special_tokens if t != end))
        return cls(encoding.name, encoding._mergeable_ranks, added, special, encoding=encoding)

    @property
    def pattern(self) -> str:
        """The regular expression of the words."""
        return WORDS if self._given is None else self._given._pat_str

    @cached_property
    def max_token_id(self) -> int:
        return max([*self.ranks.values(), *(t.id for t in self.added.values()), *self.unused.values()])

    @property
    def merges(self) -> Sequence[tuple[bytes, bytes]]:
        """The pair that produces each token, in the order of the merges. See `merges_of`."""
        return merges_of(self.ranks) if self._merges is None else self._merges

    @property
    def splits_between_words(self) -> bool:
        contents = [content for each in self._passes for content in each]
        return not self.add_prefix_space and not any(_SPACES.search(content) for content in contents)

    def id_of(self, token: str) -> int | None:
        if token in self.added:
            return self.added[token].id
        return self._ids_of_spellings.get(token)

    def token_of(self, id: int) -> str | None:
        return self._spellings.get(id)

    def token_bytes(self, id: int) -> bytes:
        if (found := self._bytes.get(id)) is None:
            raise TokenizerError(f"the tokenizer {quoted(self.name)} has no token {id}")
        return found

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        return StreamOfBytes(self)

    @property
    def fingerprint(self) -> str:
        """See `Tokenizer.fingerprint`. All spellings of GPT-2's pattern give the same fingerprint."""
        pattern = WORDS if self.pattern in SPELLINGS_OF_WORDS else self.pattern
        ranks = sorted((i, token.hex()) for token, i in self.ranks.items())
        others = {token.content: token.id for token in self.added.values()} | dict(self.unused)
        parts: list[Any] = [pattern, ranks, sorted((i, token) for token, i in others.items())]
        more: dict[str, Any] = {}
        if self.unused:
            more["unused"] = sorted(self.unused.values())
        if all(self._passes):
            more["normalized"] = sorted(self._passes[1])
        if any(self.around):
            more["around"] = [list(ids) for ids in self.around]
        if self.add_prefix_space:
            more["add_prefix_space"] = True
        return hashlib.sha256(json.dumps([*parts, more] if more else parts).encode()).hexdigest()

    def pipeline(self) -> dict[str, Any]:
        if self.pattern not in SPELLINGS_OF_WORDS:
            raise TokenizerError(
                f"the tokenizer {quoted(self.name)} cannot be saved: it splits text into words by the pattern "
                f"{quoted(self.pattern)}, not by GPT-2's, so transformers' GPT-2 tokenizer would produce other ids"
            )
        vocab, merges = self.vocab_and_merges()
        return tokenizer_json(
            {"type": "BPE", "vocab": vocab, "merges": [f"{first} {second}" for first, second in merges]},
            self.added.values(),
            pre_tokenizer={**BYTE_LEVEL, "add_prefix_space": self.add_prefix_space},
            post_processor=around_template(self.around, self._spellings),
            decoder=BYTE_LEVEL,
        )

    def vocab_and_merges(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """Return the vocabulary, with the added tokens, and the merges, spelled as in `vocab.json` and `merges.txt`.

        Raises `TokenizerError` if the files cannot represent the tokenizer.
        """
        named = f"the tokenizer {quoted(self.name)}"
        require_all_bytes(self.ranks, named)
        ordered = sorted(self.ranks, key=self.ranks.__getitem__)
        spelled = {token: spelling_of(token) for token in ordered}
        others = {**self.unused, **{token.content: token.id for token in self.added.values()}}
        vocab = {spelled[token]: self.ranks[token] for token in ordered}
        if clash := [token for token, i in others.items() if vocab.get(token, i) != i]:
            raise TokenizerError(
                f"{named} has a special token with the spelling of an ordinary one, {quoted(clash[0])}; vocab.json "
                "cannot store both"
            )
        return vocab | others, [(spelled[first], spelled[second]) for first, second in self.merges]

    def _encode(self, text: str, match: bool, add_special_tokens: bool) -> np.ndarray:
        before, after = self.around if add_special_tokens else ((), ())
        pieces = self._pieces(text) if match and self.added else [text]
        return self._ids_of([*before, *pieces, *after])

    def encode_parts(self, parts: Parts) -> list[int]:
        pieces: list[str | int] = []
        for text, is_trusted in parts:
            for piece in self._pieces(text) if is_trusted else [text]:
                if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
                    pieces[-1] += piece
                else:
                    pieces.append(piece)
        return self._ids_of(pieces).tolist()

    def _ids_of(self, pieces: Iterable[str | int]) -> np.ndarray:
        """Return the ids of a text in pieces. A piece is the id of an added token, or text without added tokens."""
        ids = [np.asarray([p], np.uint32) if isinstance(p, int) else self._encode_words(p) for p in pieces]
        return ids[0] if len(ids) == 1 else np.concatenate([np.zeros(0, np.uint32), *ids])

    def _pieces(self, text: str) -> Iterator[str | int]:
        """Yield the parts of the text between added tokens, and the ids of the added tokens."""
        if len(self.added) > _FEW_ADDED:
            yield from self._splitter.split(text)
            return
        for piece in _split(text, self._patterns[0], self._passes[0]):
            if piece in self.added and not self.added[piece].normalized:
                yield self.added[piece].id
                continue
            for part in _split(piece, self._patterns[1], self._passes[1]):
                found = self.added.get(part)
                yield found.id if found is not None and found.normalized else part

    def _encode_words(self, text: str) -> np.ndarray:
        if self.add_prefix_space and text and not text.startswith(" "):
            text = " " + text
        blocks = []
        for block in _without_long_space(text):
            is_long_space = len(block) >= _LONGEST_SPACE and block.isspace()
            encoding = self._encoding_of_spaces if is_long_space else self._encoding
            blocks.append(encoding.encode_to_numpy(block, disallowed_special=()))
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)

    def _decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self._bytes.__getitem__, ids)).decode("utf-8", "replace")

    @cached_property
    def _splitter(self) -> AddedTokenSplitter:
        return AddedTokenSplitter([*self.added.values()], f"the tokenizer {quoted(self.name)}")

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        import tiktoken

        if self._given is not None:
            return self._given
        return tiktoken.Encoding(self.name, pat_str=WORDS, mergeable_ranks=dict(self.ranks), special_tokens={})

    @cached_property
    def _encoding_of_spaces(self) -> tiktoken.Encoding:
        """The same tokenizer with a pattern that matches any length of white space at the end of a text."""
        import tiktoken

        return tiktoken.Encoding(
            self.name, pat_str=SPELLINGS_OF_WORDS[2], mergeable_ranks=dict(self.ranks), special_tokens={}
        )

    @cached_property
    def _spellings(self) -> dict[int, str]:
        others = {i: token for token, i in self.unused.items()} | {t.id: t.content for t in self.added.values()}
        return {i: spelling_of(token) for token, i in self.ranks.items()} | others

    @cached_property
    def _ids_of_spellings(self) -> dict[str, int]:
        return {token: i for i, token in self._spellings.items()}

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        own = {i: token for token, i in self.ranks.items()}
        return {i: own[i] if i in own else bytes_of_spelling(token) for i, token in self._spellings.items()}


def ranks_and_merges(
    vocab: Mapping[str, int], pairs: Sequence[tuple[str, str]], where: str
) -> tuple[dict[bytes, int], list[tuple[bytes, bytes]]]:
    """Return tiktoken's ranks for a vocabulary and its merges, and the merges as bytes.

    tiktoken ranks a merge by the id of the token that it produces, and joins any two neighbours that spell a token.
    Raises `TokenizerError` if tiktoken would give other ids.
    """
    byte_of = printable_bytes()
    merged = ["".join(pair) for pair in pairs]
    ordinary = {*merged, *byte_of}
    for pair, token in zip(pairs, merged, strict=True):
        if unknown := [part for part in (*pair, token) if part not in ordinary or part not in vocab]:
            raise TokenizerError(
                f"{where}: the merge {quoted(' '.join(pair))} needs {quoted(unknown[0])}, which has no id "
                "or does not consist of bytes or merges; only byte-level BPE is supported"
            )
    if any(later <= earlier for earlier, later in pairwise(vocab[token] for token in merged)):
        raise TokenizerError(f"{where}: token ids do not follow the order of the merges; tiktoken requires this order")
    require_merges_reached(pairs, where)
    bytes_of = {token: bytes(byte_of[c] for c in token) for token in vocab if token in ordinary}
    ranks = {content: vocab[token] for token, content in bytes_of.items()}
    require_all_bytes(ranks, where)
    return ranks, [(bytes_of[first], bytes_of[second]) for first, second in pairs]


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the pair that produces each token, in the order of the merges.

    The pair is the result of BPE on the token's bytes with all earlier merges. Raises `TokenizerError` if that result
    is not two tokens, because then no merge can produce the token. A token of n bytes takes time O(n^2), so tokenizers
    that are read from files keep the merges of the files.
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
    """Return character -> byte. Printable bytes keep their own characters. The others get characters from 256 on.

    Source: `bytes_to_unicode` in OpenAI's gpt-2/src/encoder.py, rewritten.
    """
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + k): b for k, b in enumerate(others)}


_BYTE_OF = printable_bytes()
_CHARACTER_OF = {byte: character for character, byte in _BYTE_OF.items()}


def spelling_of(token: bytes) -> str:
    """Return the spelling of a token's bytes in `vocab.json`."""
    return "".join(map(_CHARACTER_OF.__getitem__, token))


def bytes_of_spelling(token: str) -> bytes:
    """Return the bytes that the `tokenizers` package decodes a token to.

    If a character of the token represents no byte, the token decodes to its own spelling. Source:
    `ByteLevel::decode_chain` in github.com/huggingface/tokenizers, tokenizers/src/pre_tokenizers/byte_level.rs.
    """
    if all(character in _BYTE_OF for character in token):
        return bytes(map(_BYTE_OF.__getitem__, token))
    return token.encode()


def require_all_bytes(ranks: Mapping[bytes, int], where: str) -> None:
    """Require a token for every byte. tiktoken panics on text with a byte that has no token."""
    if len([token for token in ranks if len(token) == 1]) != 256:
        raise TokenizerError(f"{where}: some of the 256 bytes have no token, so not every text can be encoded")


def _any_of(contents: Sequence[str]) -> re.Pattern[str] | None:
    """Return a pattern that matches the longest of the contents at the leftmost position."""
    if not contents:
        return None
    return re.compile("(" + "|".join(map(re.escape, sorted(contents, key=len, reverse=True))) + ")")


def _split(text: str, pattern: re.Pattern[str] | None, contents: Sequence[str]) -> list[str]:
    """Return the non-empty parts of the text: the matches of the pattern, and what is between them."""
    # For a few strings, one search per string is faster than one search for a pattern with alternatives.
    if pattern is None or (len(contents) < 16 and not any(content in text for content in contents)):
        return [text] if text else []
    return [part for part in pattern.split(text) if part]


def _without_long_space(text: str) -> list[str]:
    """Split the text around very long white space, on which tiktoken panics. The ids do not change.

    If another character follows white space, GPT-2's pattern makes one word of all its characters but the last.
    """
    blocks, start = [], 0
    for at in range(_LONGEST_SPACE, len(text), _LONGEST_SPACE):
        if at < start or (found := _SPACES.match(text, at)) is None:
            continue
        first = at
        while first > start and _SPACES.match(text[first - 1]):
            first -= 1
        last = found.end()
        end = last if last == len(text) else last - 1
        if end - first >= _LONGEST_SPACE:
            blocks += [text[start:first], text[first:end]]
            start = end
    return [block for block in [*blocks, text[start:]] if block] or [text]

"""The interface of every tokenizer: text to token ids and back."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bridge.errors import TokenizerError, quoted
from bridge.tokenizers.chat.encoding import Parts, apply_chat_template, encode_conversations
from bridge.tokenizers.chat.rendering import Messages
from bridge.tokenizers.engines import Engines
from bridge.tokenizers.streams import StreamOfTexts, TextStream
from bridge.tokenizers.surrogates import without_lone_surrogates

SpecialTokenPolicy = Literal["match", "as_text", "error"]
"""What to do where the text contains the spelling of an added token.

`match` encodes it as the token's id, as transformers does. `as_text` encodes it like any other text, so that untrusted
text cannot produce an added token; this is tiktoken's `encode_ordinary`. `error` raises `TokenizerError`.
"""
POLICIES: tuple[SpecialTokenPolicy, ...] = ("match", "as_text", "error")


@dataclass(frozen=True)
class AddedToken:
    """A token that the tokenizer searches for in the text before it runs its model.

    The fields are those of `tokenizers.AddedToken`.
    """

    content: str
    id: int
    special: bool = True
    """Whether `decode(skip_special_tokens=True)` leaves it out."""
    lstrip: bool = False
    """Whether the token includes the white space to its left."""
    rstrip: bool = False
    """Whether the token includes the white space to its right."""
    single_word: bool = False
    """Whether it matches only whole words."""
    normalized: bool = False
    """Whether it is searched for in the normalized text. Tokens with False are searched for first."""


@dataclass(frozen=True)
class SpecialTokens:
    """The spelling of the special tokens, by role. A role is None if the tokenizer has no token for it."""

    bos: str | None = None
    eos: str | None = None
    unk: str | None = None
    sep: str | None = None
    pad: str | None = None
    cls: str | None = None
    mask: str | None = None
    additional: tuple[str, ...] = ()

    def by_role(self) -> dict[str, str]:
        """Return role -> spelling for each role that has a token. `additional` is not included."""
        roles = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "additional"}
        return {role: token for role, token in roles.items() if token is not None}


class Tokenizer(ABC):
    """Text to token ids and back. Instances are immutable and safe to use from several threads.

    `bridge.load(source).tokenizer()` returns the tokenizer of a checkpoint. Its ids are those of transformers'
    `AutoTokenizer` on the same files.

    Attributes:
        name: a name for messages. It does not affect the ids.
        kind: `byte-level BPE`, `bytes`, `characters`, `BPE`, `WordPiece`, `Unigram` or `WordLevel`.
        added: spelling -> added token, special or ordinary.
        special: the special tokens by role.
        source: the directory that it was read from, or None.
        around: the ids that `add_special_tokens` puts before and after every text.
        chat_directory: the directory with its chat templates, or None.
    """

    kind: str
    chat_directory: Path | None = None
    around: tuple[Sequence[int], Sequence[int]] = ((), ())

    def __init__(
        self,
        name: str,
        added: Iterable[AddedToken] = (),
        special: SpecialTokens | None = None,
        source: Path | None = None,
    ) -> None:
        self.name = name
        self.added: Mapping[str, AddedToken] = {token.content: token for token in added}
        self.special: SpecialTokens = special or SpecialTokens()
        self.source = source

    # What a kind implements

    @abstractmethod
    def _encode(self, text: str, match: bool, add_special_tokens: bool) -> np.ndarray:
        """Return uint32 ids. `text` has no lone surrogates."""

    @abstractmethod
    def _decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids that all have a token."""

    @abstractmethod
    def token_of(self, id: int) -> str | None:
        """Return the token with this id, as the vocabulary spells it, or None if the id has no token."""

    @abstractmethod
    def id_of(self, token: str) -> int | None:
        """Return the id of a token, as the vocabulary spells it, or None if it is not a token."""

    @abstractmethod
    def token_bytes(self, id: int) -> bytes:
        """Return the UTF-8 bytes of one token.

        A token may be a part of a character. Raises `TokenizerError` for an id without a token. In `WordPiece` and
        `Unigram`, the text of a token depends on its neighbours; use `stream` to decode such tokens.
        """

    @property
    @abstractmethod
    def max_token_id(self) -> int:
        """The largest id."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """The SHA-256, in hex, of everything that determines the ids. It does not depend on the name or the files."""

    @abstractmethod
    def pipeline(self) -> dict[str, Any]:
        """Return the content of an equivalent `tokenizer.json`.

        Raises `TokenizerError` if no `tokenizer.json` can represent the tokenizer.
        """

    # The interface

    @property
    def vocab_size(self) -> int:
        """The largest id, plus 1."""
        return self.max_token_id + 1

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The id of the end-of-sequence token; empty if the tokenizer has no such token."""
        found = None if self.special.eos is None else self.id_of(self.special.eos)
        return () if found is None else (found,)

    @property
    def splits_between_words(self) -> bool:
        """Whether a text can be split between a word and the white space after it without changing the ids."""
        return False

    def encode(
        self, text: str, *, special_tokens: SpecialTokenPolicy = "match", add_special_tokens: bool = True
    ) -> list[int]:
        """Return the ids of a text. A lone surrogate is encoded as U+FFFD.

        Args:
            special_tokens: what to do where the text contains an added token; see `SpecialTokenPolicy`.
            add_special_tokens: add the tokens that the tokenizer puts around every text, such as a
                beginning-of-sequence token. GPT-2's adds none.

        Raises:
            TokenizerError: the tokenizer cannot encode the text, or the text contains an added token under `error`.

        >>> byte_tokenizer().encode("hi<|endoftext|>")
        [104, 105, 256]
        >>> byte_tokenizer().encode("<|", special_tokens="as_text")
        [60, 124]
        """
        return self.encode_to_numpy(text, special_tokens=special_tokens, add_special_tokens=add_special_tokens).tolist()

    def encode_to_numpy(
        self, text: str, *, special_tokens: SpecialTokenPolicy = "match", add_special_tokens: bool = True
    ) -> np.ndarray:
        """Return the ids as an array, uint32 [T]. The arguments are those of `encode`."""
        _require_policy(special_tokens)
        text = without_lone_surrogates(text)
        if special_tokens == "error":
            self._require_no_added_token(text)
        return self._encode(text, special_tokens == "match", add_special_tokens)

    def encode_batch(
        self, texts: Sequence[str], *, special_tokens: SpecialTokenPolicy = "match", add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Return the ids of each text, encoded on several threads. The other arguments are those of `encode`."""

        def encoded(text: str) -> list[int]:
            return self.encode(text, special_tokens=special_tokens, add_special_tokens=add_special_tokens)

        if len(texts) < 2:
            return [encoded(text) for text in texts]
        with ThreadPoolExecutor(min(len(texts), os.cpu_count() or 1)) as pool:
            return list(pool.map(encoded, texts))

    def encode_with_offsets(
        self, text: str, *, special_tokens: SpecialTokenPolicy = "match", add_special_tokens: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids and, for each, the start and end of its characters in the text.

        Tokens that share a character have overlapping offsets. Tokens that `add_special_tokens` adds have (0, 0). The
        arguments are those of `encode`.
        """
        ids = self.encode(text, special_tokens=special_tokens, add_special_tokens=add_special_tokens)
        encoded = self._engines.encode(without_lone_surrogates(text), special_tokens != "as_text", add_special_tokens)
        assert encoded.ids == ids
        return ids, encoded.offsets

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ids.

        Ids without a token are skipped, as in transformers: a model with a padded vocabulary may sample them. Bytes
        that are not UTF-8 become U+FFFD.

        Args:
            skip_special_tokens: leave out the special tokens. Ordinary added tokens remain.
        """
        skipped = self._special_ids if skip_special_tokens else frozenset()
        return self._decode([i for i in map(int, ids) if i not in skipped and self.token_of(i) is not None])

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """Return a decoder that takes one token at a time.

        Args:
            context: the ids that precede the first token. The text of the first token may depend on them.
        """
        return StreamOfTexts(self.decode, context)

    def apply_chat_template(
        self, messages: Messages, *, template: str | None = None, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """Return the text of a conversation. It is the text of transformers' `apply_chat_template(tokenize=False)`.

        The template runs in a separate process with limits on its time and memory. This needs the `chat` extra.

        Args:
            messages: objects with `role` and `content`.
            template: the name of the template, for checkpoints with several.
            add_generation_prompt: append the beginning of the assistant's reply.
            variables: further variables of the template. JSON must be able to represent them.

        Raises:
            TokenizerError: there is no such template, or it fails, takes too long, or rejects the messages.
        """
        variables["add_generation_prompt"] = add_generation_prompt
        return apply_chat_template(self, messages, template, variables)

    def encode_conversations(
        self,
        conversations: Sequence[Messages],
        *,
        template: str | None = None,
        add_generation_prompt: bool = False,
        special_tokens: SpecialTokenPolicy = "match",
        **variables: Any,
    ) -> list[list[int]]:
        """Return the ids of each conversation. They are those of transformers' `apply_chat_template`.

        The other arguments are those of `apply_chat_template`.

        Args:
            special_tokens: what to do where a message contains an added token; see `SpecialTokenPolicy`. The tokens
                that the template itself writes are always matched.

        Raises:
            TokenizerError: as `apply_chat_template` raises it. Also, under `as_text` and `error`, if the template
                changes the messages so much that their text cannot be distinguished from the template's own.
        """
        _require_policy(special_tokens)
        variables["add_generation_prompt"] = add_generation_prompt
        return encode_conversations(self, conversations, template, variables, special_tokens)

    def encode_parts(self, parts: Parts) -> list[int]:
        """Return the ids of a text in parts. Added tokens are matched only in trusted parts.

        Raises `TokenizerError` if another part has an added token that this kind of tokenizer cannot encode as text.
        """
        text = "".join(part for part, _ in parts)
        ids, offsets = self.encode_with_offsets(text, add_special_tokens=False)
        added, start = {token.id for token in self.added.values()}, 0
        for part, is_trusted in parts:
            end = start + len(part)
            inside = (i for i, (a, b) in zip(ids, offsets, strict=True) if i in added and a < end and b > start)
            if not is_trusted and (found := next(inside, None)) is not None:
                raise TokenizerError(
                    f"a message contains the token {quoted(self.token_of(found))}, which this kind of tokenizer "
                    f'({self.kind}) cannot encode as text; remove it, or use special_tokens="match"'
                )
            start = end
        return ids

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(token.id for token in self.added.values() if token.special)

    @cached_property
    def _engines(self) -> Engines:
        return Engines(self.pipeline(), f"the tokenizer {quoted(self.name)}")

    def _require_no_added_token(self, text: str) -> None:
        matched = self._encode(text, True, False)
        if np.array_equal(matched, self._encode(text, False, False)):
            return
        ids = {int(i) for i in matched}
        found = [token.content for token in self.added.values() if token.id in ids]
        raise TokenizerError(
            f"the text contains the token {quoted(found[0] if found else '')}; remove it, or choose "
            "special_tokens='match' or 'as_text' (--special-tokens)"
        )


def _require_policy(special_tokens: str) -> None:
    if special_tokens not in POLICIES:
        raise TokenizerError(f"special_tokens={quoted(special_tokens)}: must be one of {', '.join(POLICIES)}")


def tokenizer_json(
    model: Mapping[str, Any],
    added: Iterable[AddedToken],
    *,
    normalizer: Mapping[str, Any] | None = None,
    pre_tokenizer: Mapping[str, Any] | None = None,
    post_processor: Mapping[str, Any] | None = None,
    decoder: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of a `tokenizer.json`."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [dict(vars(token)) for token in sorted(added, key=lambda token: token.id)],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": model,
    }

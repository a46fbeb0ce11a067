"""Tokenizers that a `tokenizer.json` describes and the `tokenizers` package runs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bridge.errors import TokenizerError, quoted
from bridge.tokenizers.byte_level_bpe import bytes_of_spelling, printable_bytes
from bridge.tokenizers.engines import BYTE, Engines
from bridge.tokenizers.post_processors import NOTHING, Around
from bridge.tokenizers.streams import StreamOfBytes, StreamOfTexts, TextStream
from bridge.tokenizers.surrogates import without_lone_surrogates
from bridge.tokenizers.tokenizer import AddedToken, SpecialTokenPolicy, SpecialTokens, Tokenizer

_CLEANED_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
"""Source: `clean_up_tokenization` in transformers' tokenization_utils_base.py."""
_BETWEEN_WORDS = re.compile(r"(?<=\w) (?=[^\W_n])")


class PipelineTokenizer(Tokenizer):
    """A tokenizer that is described by a `tokenizer.json`."""

    def __init__(
        self,
        name: str,
        stored: Mapping[str, Any],
        added: Iterable[AddedToken],
        special: SpecialTokens,
        source: Path | None = None,
        *,
        around: Around = NOTHING,
        clean_up: bool = False,
    ) -> None:
        """
        Args:
            stored: the content of the `tokenizer.json`.
            added: the tokens of its `added_tokens`.
            around: the ids that its post-processor puts before and after every text.
            clean_up: remove the spaces before punctuation in decoded text (`clean_up_tokenization_spaces`).
        """
        super().__init__(name, added, special, source)
        self.stored = stored
        self.kind: str = "byte-level BPE" if self._is_byte_level else stored["model"]["type"]
        self.around: Around = around
        self.clean_up: bool = clean_up and self.kind not in ("BPE", "byte-level BPE")  # as in transformers

    @cached_property
    def _engines(self) -> Engines:
        return Engines(self.stored, f"the tokenizer {quoted(self.name)}")

    def require_valid(self) -> None:
        """Build the tokenizer. Raises `TokenizerError` if the `tokenizers` package rejects it."""
        engine = self._engines.matching
        for token in self.added.values():
            if (found := engine.token_to_id(token.content)) != token.id:
                raise TokenizerError(
                    f"the added token {quoted(token.content)} has the id {token.id}, but its place in the "
                    f"vocabulary gives it the id {found}"
                )

    @cached_property
    def _ids(self) -> dict[str, int]:
        vocab = self.stored["model"]["vocab"]
        own = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
        return own | {token.content: token.id for token in self.added.values()}

    @cached_property
    def _tokens(self) -> dict[int, str]:
        return {i: token for token, i in self._ids.items()}

    @cached_property
    def max_token_id(self) -> int:
        return max(self._tokens)

    def id_of(self, token: str) -> int | None:
        return self._ids.get(token)

    def token_of(self, id: int) -> str | None:
        return self._tokens.get(id)

    def token_bytes(self, id: int) -> bytes:
        if (token := self.token_of(id)) is None:
            raise TokenizerError(f"the tokenizer {quoted(self.name)} has no token {id}")
        if self._is_byte_level:
            return bytes_of_spelling(token)
        if self.stored["model"].get("byte_fallback") and (byte := BYTE.fullmatch(token)):
            return bytes.fromhex(byte[1])
        once, twice = self._decode([id]), self._decode([id, id])
        return twice[len(once) :].encode()

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        if self._is_byte_level:
            return StreamOfBytes(self)
        return _StreamOfCleanTexts(self._decode_all, context) if self.clean_up else super().stream(context)

    @property
    def fingerprint(self) -> str:
        parts = {key: self.stored.get(key) for key in ("model", "normalizer", "pre_tokenizer", "post_processor")}
        added = sorted((t.id, t.content, t.lstrip, t.rstrip, t.single_word, t.normalized) for t in self.added.values())
        return hashlib.sha256(json.dumps([parts, added], sort_keys=True).encode()).hexdigest()

    def pipeline(self) -> dict[str, Any]:
        return dict(self.stored)

    def encode_batch(
        self, texts: Sequence[str], *, special_tokens: SpecialTokenPolicy = "match", add_special_tokens: bool = True
    ) -> list[list[int]]:
        if special_tokens == "error" or self._missing_bytes:
            return super().encode_batch(texts, special_tokens=special_tokens, add_special_tokens=add_special_tokens)
        repaired = [without_lone_surrogates(text) for text in texts]
        return self._engines.encode_batch(repaired, special_tokens == "match", add_special_tokens)

    def _encode(self, text: str, match: bool, add_special_tokens: bool) -> np.ndarray:
        if self._missing_bytes and (missing := self._missing_bytes & {*text.encode()}):
            raise TokenizerError(
                f"the tokenizer {quoted(self.name)} has no token for the byte 0x{min(missing):02X}, which is part of "
                f"{quoted(text, 40)}; transformers leaves such bytes out of the text"
            )
        return np.array(self._engines.encode_batch([text], match, add_special_tokens)[0], np.uint32)

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._engines.decode(ids)
        return _cleaned_up(text) if self.clean_up else text

    def _decode_all(self, ids: Sequence[int]) -> str:
        return self._engines.decode([i for i in ids if self.token_of(i) is not None])

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        # The package compares the normalized spelling of a token with the special tokens.
        special = {token.content for token in self.added.values() if token.special}
        engine = self._engines.matching
        return frozenset(t.id for t in self.added.values() if engine.id_to_token(t.id) in special)

    @cached_property
    def _missing_bytes(self) -> frozenset[int]:
        """The bytes without a token, if this is a byte-level BPE that has no token for unknown text either."""
        model = self.stored["model"]
        if not self._is_byte_level or model.get("unk_token") is not None or model.get("byte_fallback"):
            return frozenset()
        return frozenset(byte for character, byte in printable_bytes().items() if character not in model["vocab"])

    @property
    def _is_byte_level(self) -> bool:
        decoder = self.stored.get("decoder")
        return (
            self.stored["model"]["type"] == "BPE"
            and isinstance(decoder, dict)
            and decoder.get("type") == "ByteLevel"
            and "ByteLevel" in component_types(self.stored.get("pre_tokenizer"))
        )


class _StreamOfCleanTexts(StreamOfTexts):
    """For tokenizers that clean up. Text is complete up to a space between words that clean-up cannot remove."""

    kept = ""

    def add(self, id: int) -> str:
        self.kept += super().add(id)
        cuts = [found.start() for found in _BETWEEN_WORDS.finditer(self.kept)]
        cut = cuts[-1] if cuts else 0
        text, self.kept = self.kept[:cut], self.kept[cut:]
        return _cleaned_up(text)

    def flush(self) -> str:
        text, self.kept = self.kept + super().flush(), ""
        return _cleaned_up(text)


def _cleaned_up(text: str) -> str:
    for found in _CLEANED_UP:
        text = text.replace(found, found.strip(" "))
    return text


def component_types(component: Any) -> set[str]:
    """Return the types of a component of a `tokenizer.json`, and of the parts of a sequence."""
    if not isinstance(component, dict):
        return set()
    parts = component.get("pretokenizers") or component.get("normalizers") or component.get("decoders") or []
    found = {str(component.get("type"))}
    return found.union(*(component_types(part) for part in parts)) if isinstance(parts, list) else found

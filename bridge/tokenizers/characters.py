"""A tokenizer of single characters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bridge.errors import TokenizerError, quoted
from bridge.tokenizers.streams import StreamOfBytes, TextStream
from bridge.tokenizers.tokenizer import Tokenizer, tokenizer_json
from bridge.tokenizers.validation import require_distinct_ids

_CHARACTER = r"[\s\S]"

CHARACTERS_APART = {"type": "Split", "pattern": {"Regex": _CHARACTER}, "behavior": "Isolated", "invert": False}
"""The pre-tokenizer in a `tokenizer.json` of single characters."""


class CharacterTokenizer(Tokenizer):
    """A tokenizer with one token per character. An unknown character is an error."""

    kind = "characters"

    def __init__(self, name: str, ids: Mapping[str, int], where: str, source: Path | None = None) -> None:
        """
        Args:
            ids: character -> id.
            where: the source of the characters, a prefix of error messages.
        """
        super().__init__(name, source=source)
        require_distinct_ids(ids, where)
        if not ids:
            raise TokenizerError(f"{where}: a tokenizer needs at least one character")
        for character in ids:
            if len(character) != 1 or "\ud800" <= character <= "\udfff":
                raise TokenizerError(f"{where}: {quoted(character)} is not a single character that UTF-8 can encode")
        self._ids = dict(ids)

    @property
    def characters(self) -> list[str]:
        """The characters, in the order of their ids."""
        return sorted(self._ids, key=self._ids.__getitem__)

    @property
    def splits_between_words(self) -> bool:
        return True

    @cached_property
    def max_token_id(self) -> int:
        return max(self._ids.values())

    def id_of(self, token: str) -> int | None:
        return self._ids.get(token)

    def token_of(self, id: int) -> str | None:
        return self._characters.get(id)

    def token_bytes(self, id: int) -> bytes:
        if (found := self.token_of(id)) is None:
            raise TokenizerError(
                f"the tokenizer has no token {id}, only ids up to {self.max_token_id}; the model's vocabulary is "
                "larger than the tokenizer's, or the tokenizer belongs to another model"
            )
        return found.encode()

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        return StreamOfBytes(self)

    @property
    def fingerprint(self) -> str:
        ranks = sorted((i, character.encode().hex()) for character, i in self._ids.items())
        return hashlib.sha256(json.dumps([_CHARACTER, ranks, []]).encode()).hexdigest()

    def pipeline(self) -> dict[str, Any]:
        # The unknown token is not in the vocabulary, so that transformers rejects unknown characters too.
        model = {"type": "WordLevel", "vocab": self._ids, "unk_token": "<unknown>"}
        return tokenizer_json(model, (), pre_tokenizer=CHARACTERS_APART, decoder={"type": "Fuse"})

    def _encode(self, text: str, match: bool, add_special_tokens: bool) -> np.ndarray:
        try:
            return np.fromiter(map(self._ids.__getitem__, text), np.uint32, len(text))
        except KeyError as error:
            unknown = error.args[0]
        raise TokenizerError(
            f"the tokenizer has no character {quoted(unknown)} (U+{ord(unknown):04X}), only the {len(self._ids)} "
            "characters that it was made from; remove the character, or train with bytes or BPE, which encode every "
            "text"
        )

    def _decode(self, ids: Sequence[int]) -> str:
        return "".join(map(self._characters.__getitem__, ids))

    @cached_property
    def _characters(self) -> dict[int, str]:
        return {i: character for character, i in self._ids.items()}

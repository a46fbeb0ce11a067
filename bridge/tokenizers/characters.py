"""A tokenizer of single characters. This module imports tiktoken, so other modules import it only when needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tiktoken

from bridge.errors import TokenizerError, quoted
from bridge.tokenizers.validation import require_distinct_ids


class CharacterEncoding(tiktoken.Encoding):
    """A tokenizer with one token per character. Unknown characters and ids raise `TokenizerError`.

    `tiktoken.Encoding` would panic on an unknown character, and raise a KeyError on an unknown id.
    """

    def __init__(self, name: str, ids: Mapping[str, int], where: str) -> None:
        """
        Args:
            ids: character -> id.
            where: the source of the characters, a prefix of error messages.
        """
        require_distinct_ids(ids, where)
        if not ids:
            raise TokenizerError(f"{where}: a tokenizer needs at least one character")
        for character in ids:
            if len(character) != 1 or "\ud800" <= character <= "\udfff":
                raise TokenizerError(f"{where}: {quoted(character)} is not a single character that UTF-8 can encode")
        ranks = {character.encode(): i for character, i in ids.items()}
        super().__init__(name, pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={})
        self._ids = dict(ids)

    def __reduce__(self) -> tuple[Any, ...]:
        return CharacterEncoding, (self.name, self._ids, self.name)

    def encode_ordinary(self, text: str) -> list[int]:
        try:
            return list(map(self._ids.__getitem__, text))
        except KeyError as error:
            unknown = error.args[0]
        raise TokenizerError(
            f"the tokenizer has no character {quoted(unknown)} (U+{ord(unknown):04X}), only the {len(self._ids)} of "
            "the text that it was made from; remove the character, or train with bytes or BPE, which encode every text"
        )

    def encode(self, text: str, **_: Any) -> list[int]:
        return self.encode_ordinary(text)

    def encode_to_numpy(self, text: str, **_: Any) -> np.ndarray[Any, np.dtype[np.uint32]]:
        return np.array(self.encode_ordinary(text), dtype=np.uint32)

    def encode_with_unstable(self, text: str, **_: Any) -> tuple[list[int], list[list[int]]]:
        return self.encode_ordinary(text), []

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        try:
            return super().decode_bytes(tokens)
        except (KeyError, OverflowError):
            known = set(self._ids.values())
        unknown = next(i for i in tokens if i not in known)
        raise TokenizerError(
            f"the tokenizer has no token {unknown}, only ids up to {self.max_token_value}; the model's vocabulary "
            "is larger than its tokenizer, or they do not belong together"
        )

    def decode(self, tokens: Sequence[int], errors: str = "replace") -> str:
        return self.decode_bytes(tokens).decode("utf-8", errors)

    def decode_single_token_bytes(self, token: int) -> bytes:
        return self.decode_bytes([token])

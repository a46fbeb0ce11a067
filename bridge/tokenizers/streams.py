"""Decode tokens to text, one at a time."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bridge.tokenizers.tokenizer import Tokenizer


class TextStream(ABC):
    """Decodes tokens to text, one at a time."""

    @abstractmethod
    def add(self, id: int) -> str:
        """Return the text that is complete after one more token. An id without a token adds nothing."""

    @abstractmethod
    def flush(self) -> str:
        """Return the text of an incomplete character at the end, as U+FFFD."""


class StreamOfBytes(TextStream):
    """For tokenizers whose text is the concatenation of the tokens' bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.decoder: codecs.IncrementalDecoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, id: int) -> str:
        known = self.tokenizer.token_of(id) is not None
        return self.decoder.decode(self.tokenizer.token_bytes(id)) if known else ""

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


class StreamOfTexts(TextStream):
    """For tokenizers in which the text of a token depends on its neighbours.

    The text of a token is the text that it adds to its context. The context is all tokens of the previous piece of
    text, because a decoder may reject bytes that do not start at a character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int]) -> None:
        self.decode = decode
        self.before: list[int] = list(context)
        self.new: list[int] = []

    def add(self, id: int) -> str:
        self.new.append(id)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):  # the next token may complete the character
            return ""
        self.before, self.new = self.new, []
        return text

    def flush(self) -> str:
        text = self._new_text()
        self.new = []
        return text

    def _new_text(self) -> str:
        before = self.decode(self.before)
        return self.decode([*self.before, *self.new])[len(before) :]

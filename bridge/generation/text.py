"""Text in, text out, over any backend's `Decoder` and any tokenizer."""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bridge.errors import BridgeError, TokenizerError
from bridge.generation.config import GenerationConfig
from bridge.generation.decoder import ENDED, Decoder, InvalidLogits
from bridge.tokenizers.byte_level_bpe import END_OF_TEXT

if TYPE_CHECKING:
    import tiktoken

STREAMED_AT_A_TIME = 4
"""Tokens between two pieces of streamed text: a tenth of a second for 124M parameters on CPU."""

PROMPTS_AT_A_TIME = 32
"""Rows that run together: a cache for all of a long list would not fit in memory."""

STOPPED_AT_A_TIME = 16
"""Tokens between two looks for a stop string."""


_DIRECTION = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True)
class TextOutput:
    """One continuation of a text."""

    text: str
    """Without the prompt, and without what stopped it."""
    ids: list[int]
    """New tokens, to the one that completed a stop string or is a stop id."""
    log_probs: list[float] | None
    """Of each of them, in nats, where they were asked for."""
    stopped: bool
    """By a stop string or a stop id, and not by `max_new_tokens`."""


def complete(
    decoder: Decoder[Any, Any],
    tokenizer: tiktoken.Encoding,
    prompts: Sequence[str],
    request: GenerationConfig,
    stop: Sequence[str] = (),
) -> list[list[TextOutput]]:
    """Return `request.samples` completions for each prompt. Each also ends before any of the strings `stop`.

    Set `stop_ids=bridge.end_of_text_ids(tokenizer)` in the request to end completions at the end of a document.

    Raises `BridgeError` for an invalid request, a text that the tokenizer cannot encode, and logits that are NaN or
    infinite.
    """
    ids = [tokenizer.encode_ordinary(prompt) for prompt in prompts]
    request.check(decoder.config, ids)
    found = []
    for i in range(0, len(ids), PROMPTS_AT_A_TIME):
        try:
            found += _complete(decoder, tokenizer, ids[i : i + PROMPTS_AT_A_TIME], request, stop)
        except InvalidLogits as error:
            raise InvalidLogits(i * request.samples + error.row, error.step) from None
    return found


def _complete(
    decoder: Decoder[Any, Any],
    tokenizer: tiktoken.Encoding,
    ids: Sequence[Sequence[int]],
    request: GenerationConfig,
    stop: Sequence[str],
) -> list[list[TextOutput]]:
    if request.beams > 1:
        found = decoder.generate(ids, request)
        rows = [_Row(tokenizer, request, stop) for continuations in found for _ in continuations]
        for row, continuation in zip(rows, (c for continuations in found for c in continuations), strict=True):
            row.read(continuation.ids, continuation.log_probs)
    else:
        rows = [_Row(tokenizer, request, stop) for _ in range(len(ids) * request.samples)]
        for chunk in decoder.stream(ids, request, STOPPED_AT_A_TIME if stop else None):
            for r, row in enumerate(rows):
                row.read(chunk.ids[r].tolist(), None if chunk.log_probs is None else chunk.log_probs[r].tolist())
            if all(row.stopped for row in rows):
                break
    done = [row.completion() for row in rows]
    return [done[i : i + request.samples] for i in range(0, len(done), request.samples)]


def stream_text(
    decoder: Decoder[Any, Any],
    tokenizer: tiktoken.Encoding,
    prompt: str,
    request: GenerationConfig,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """The completion of one prompt, piece by piece as it is made; no piece ends inside a character or a stop string."""
    row = _Row(tokenizer, request, stop)
    for chunk in decoder.stream([tokenizer.encode_ordinary(prompt)], request, STREAMED_AT_A_TIME):
        if piece := row.read(chunk.ids[0].tolist()):
            yield piece
        if row.stopped:
            return
    if piece := row.rest():
        yield piece


def end_of_text_ids(tokenizer: tiktoken.Encoding) -> tuple[int, ...]:
    """For `GenerationConfig.stop_ids`: the id that ends a document, or none where the tokenizer has none."""
    found = tokenizer._special_tokens.get(END_OF_TEXT)
    return () if found is None else (found,)


def printable(text: str) -> str:
    """The text without control characters and marks of direction, which a terminal would obey."""
    return "".join(
        "\ufffd" if (unicodedata.category(c) == "Cc" and c not in "\n\t") or c in _DIRECTION else c for c in text
    )


@dataclass
class _Row:
    """The text of one continuation, read token by token."""

    tokenizer: tiktoken.Encoding
    request: GenerationConfig
    stop: Sequence[str]
    text: str = ""
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    stopped: bool = False
    held: str = ""
    """Text that may be the beginning of a stop string."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise BridgeError(f"stop: {self.stop!r} is one string; give a list of strings")
        if "" in self.stop:
            raise BridgeError("stop: an empty string would end every text where it begins; leave it out")
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self, ids: Sequence[int], log_probs: Sequence[float] | None = None) -> str:
        """What is added to the text; tokens after the one that stops it are left alone."""
        before = len(self.text)
        for i, token in enumerate(ids):
            if self.stopped or token == ENDED:
                break
            self.ids.append(token)
            if log_probs is not None:
                self.log_probs.append(log_probs[i])
            if token in self.request.stop_ids:
                self.rest()
                self.stopped = True
            else:
                self._add(self._bytes_of(token))
        return self.text[before:]

    def rest(self) -> str:
        """What was held back, and now is part of the text; nothing once a stop string was found."""
        before = len(self.text)
        if not self.stopped:
            self._add(b"", final=True)
            if not self.stopped:
                self.text, self.held = self.text + self.held, ""
        return self.text[before:]

    def completion(self) -> TextOutput:
        self.rest()
        return TextOutput(self.text, self.ids, self.log_probs if self.request.log_probs else None, self.stopped)

    def _add(self, new: bytes, final: bool = False) -> None:
        self.held += self.decoder.decode(new, final)
        found = [(place + len(s), place) for s in self.stop if (place := self.held.find(s)) >= 0]
        if found:
            self.stopped = True
            keep = min(found)[1]  # of what is complete first, as if the text came one character at a time
        else:
            keep = len(self.held) - max((_overlap(self.held, s) for s in self.stop), default=0)
        self.text, self.held = self.text + self.held[:keep], self.held[keep:]

    def _bytes_of(self, token: int) -> bytes:
        # A model whose vocabulary is padded may draw ids that are no tokens.
        with suppress(KeyError, OverflowError, TokenizerError):
            return self.tokenizer.decode_single_token_bytes(token)
        return b""


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

"""The `tokenizers` package, which runs everything that a `tokenizer.json` can describe.

The package is written in Rust, and its panics are not `Exception`s. This module converts panics and exceptions to
`TokenizerError`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bridge.errors import TokenizerError, quoted

if TYPE_CHECKING:
    from bridge.tokenizers.tokenizer import AddedToken

BYTE = re.compile("<0x([0-9A-F]{2})>")
"""The token of a byte, in a model with `byte_fallback`."""


class Engines:
    """The two forms of one `tokenizer.json`: one matches its added tokens in the text, the other does not."""

    def __init__(self, stored: Mapping[str, Any], where: str) -> None:
        """
        Args:
            stored: the content of a `tokenizer.json`. Its `truncation` and `padding` are ignored, as in transformers.
            where: the source of the tokenizer, a prefix of error messages.
        """
        self.stored: dict[str, Any] = {**stored, "truncation": None, "padding": None}
        self.where = where

    def encode(self, text: str, match: bool, add_special_tokens: bool) -> Any:
        """Return a `tokenizers.Encoding`, with ids and offsets."""
        with _reporting(self.where, f"cannot encode {quoted(text, 40)}"):
            return self._engine(match).encode(text, add_special_tokens=add_special_tokens)

    def encode_batch(self, texts: Sequence[str], match: bool, add_special_tokens: bool) -> list[list[int]]:
        """Return the ids of each text. The package encodes them on several threads and releases the GIL."""
        with _reporting(self.where, "cannot encode a text"):
            encoded = self._engine(match).encode_batch_fast([*texts], add_special_tokens=add_special_tokens)
            return [each.ids for each in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        with _reporting(self.where, "cannot decode ids"):
            return self.matching.decode([*ids], skip_special_tokens=False)

    def _engine(self, match: bool) -> Any:
        return self.matching if match else self.as_text

    @cached_property
    def matching(self) -> Any:
        """The `tokenizers.Tokenizer` that matches added tokens."""
        return self._made(self.stored)

    @cached_property
    def as_text(self) -> Any:
        """The `tokenizers.Tokenizer` that encodes the spelling of an added token like any other text."""
        return self._made(without_added_tokens(self.stored))

    def _made(self, stored: Mapping[str, Any]) -> Any:
        from tokenizers import Tokenizer

        with _reporting(self.where, "the tokenizers package rejects it"):
            return Tokenizer.from_str(json.dumps(stored))


@contextmanager
def _reporting(where: str, doing: str) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # pyo3's PanicException is not an Exception
        raise TokenizerError(f"{where}: {doing}: {quoted(error, 200)}") from None


class AddedTokenSplitter:
    """Splits a text at any number of added tokens, as the package does before its model runs."""

    def __init__(self, added: Sequence[AddedToken], where: str) -> None:
        import tokenizers

        self.where = where
        self._ids = [token.id for token in added]
        # The model encodes every text between two added tokens as the same single token.
        self._engine = tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, ""))
        self._engine.add_tokens([tokenizers.AddedToken(t.content, normalized=t.normalized) for t in added])

    def split(self, text: str) -> list[str | int]:
        """Return the parts of the text between added tokens, and the ids of the added tokens."""
        with _reporting(self.where, f"cannot encode {quoted(text, 40)}"):
            found = self._engine.encode(text)
        return [
            self._ids[id - 1] if id else text[start:end]
            for id, (start, end) in zip(found.ids, found.offsets, strict=True)
        ]


def without_added_tokens(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `tokenizer.json` that matches no added token.

    A model can produce an added token from its spelling if the token is in its vocabulary too, as `</s>` is in a
    SentencePiece model. Such an entry gets a spelling that no text has: a noncharacter of Unicode and a space. Tokens
    of single bytes keep their spelling, because they also encode other text.
    """
    contents = {token["content"] for token in stored.get("added_tokens") or []}
    model = dict(stored["model"])
    if model.get("byte_fallback"):
        contents = {content for content in contents if not BYTE.fullmatch(content)}
    if isinstance(model.get("vocab"), dict):
        merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges") or []]
        used = {part for merge in merges for part in (*merge, "".join(merge))}
        # Single characters keep their spelling, because BPE starts from them.
        symbols = {token for token in contents if len(token) == 1} if model["type"] == "BPE" else set()
        hidden = contents - used - symbols - {model.get("unk_token")}
        model["vocab"] = {_hidden(token) if token in hidden else token: i for token, i in model["vocab"].items()}
    elif isinstance(model.get("vocab"), list):
        model["vocab"] = [
            [_hidden(piece) if piece in contents and i != model.get("unk_id") else piece, score]
            for i, (piece, score) in enumerate(model["vocab"])
        ]
    return {**stored, "added_tokens": [], "model": model}


def _hidden(token: str) -> str:
    return f"\ufdd0 {token}"

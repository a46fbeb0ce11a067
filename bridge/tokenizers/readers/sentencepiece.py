"""SentencePiece models (`spiece.model`), as transformers' `T5Tokenizer` reads them (rinna's Japanese GPT-2 has one).

A model is a protocol buffer. Only the fields below are read, by a reader of the wire format that checks every length.

Sources: sentencepiece_model.proto of github.com/google/sentencepiece, protobuf.dev/programming-guides/encoding, and
`T5Tokenizer` and `SentencePieceExtractor` of transformers 5.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bridge.errors import TokenizerError, quoted
from bridge.storage.companions import MOST_TOKENS
from bridge.tokenizers.post_processors import template
from bridge.tokenizers.tokenizer import AddedToken, tokenizer_json

SPIECE = "spiece.model"
CLASSES = ("T5Tokenizer",)
DEFAULTS = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

Pieces = list[tuple[str, float]]

_UNIGRAM = 1
_CONTROL, _USER_DEFINED = 3, 4
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5  # wire types
_T5S_UNKNOWN = 2  # T5Tokenizer ignores the model's own unk_id
_MOST_EXTRA_IDS = 1000
_METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


@dataclass(frozen=True)
class Model:
    """The parts of a SentencePiece model that decide the ids."""

    pieces: Pieces
    """Piece and score. The id is the place in the list."""
    symbols: tuple[AddedToken, ...]
    """The control pieces, which are special, and the user-defined ones, which are not."""
    charsmap: bytes
    """The table of the normalizer; empty if text is not normalized."""


def parse(content: bytes, where: str, most: int = MOST_TOKENS) -> Model:
    """Read a model with at most `most` pieces.

    Raises `TokenizerError` for a file that is damaged, or is not a Unigram model.
    """
    pieces: Pieces = []
    symbols: list[AddedToken] = []
    charsmap, kind = b"", _UNIGRAM
    for number, value in _fields(content, where):
        if number == 1 and isinstance(value, bytes):
            if len(pieces) == most:
                raise TokenizerError(f"{where} has more than {most} pieces; they do not belong to this model")
            piece, score, type = _piece(value, where)
            if type in (_CONTROL, _USER_DEFINED):
                symbols.append(AddedToken(piece, len(pieces), special=type == _CONTROL))
            pieces.append((piece, score))
        elif number == 2 and isinstance(value, bytes):  # trainer_spec
            kinds = [v for n, v in _fields(value, where) if n == 3 and isinstance(v, int)]
            kind = kinds[-1] if kinds else kind
        elif number == 3 and isinstance(value, bytes):  # normalizer_spec
            tables = [v for n, v in _fields(value, where) if n == 2 and isinstance(v, bytes)]
            charsmap = tables[-1] if tables else charsmap
    if kind != _UNIGRAM:
        raise TokenizerError(
            f"{where} is a SentencePiece model of the type {kind}; only Unigram (1) is supported. Save its "
            "tokenizer.json with transformers, and put it there"
        )
    if not pieces:
        raise TokenizerError(f"{where} is not a SentencePiece model: it has no pieces")
    if len({piece for piece, _ in pieces}) < len(pieces):
        raise TokenizerError(f"{where} has a piece twice")
    return Model(pieces, tuple(symbols), charsmap)


def extra_tokens(settings: Mapping[str, Any], where: str) -> list[str]:
    """Return the sentinels that `T5Tokenizer` adds: `extra_ids` of them, 100 by default."""
    count = settings.get("extra_ids", 100)
    if type(count) is not int or not 0 <= count <= _MOST_EXTRA_IDS:
        raise TokenizerError(f"{where}: extra_ids={quoted(count)} is not a number from 0 to {_MOST_EXTRA_IDS}")
    return [f"<extra_id_{i}>" for i in range(count - 1, -1, -1)]


def pipeline(
    pieces: Sequence[tuple[str, float]], charsmap: str | None, ids: Mapping[str, int], added: Sequence[AddedToken]
) -> dict[str, Any]:
    """Return the content of the `tokenizer.json` of a `T5Tokenizer`.

    Args:
        charsmap: the table of the normalizer in base64, or None.
        ids: spelling -> id of the vocabulary and the added tokens.
    """
    end = "</s>"
    return tokenizer_json(
        {"type": "Unigram", "unk_id": _T5S_UNKNOWN, "vocab": [list(p) for p in pieces], "byte_fallback": False},
        added,
        normalizer=None if charsmap is None else {"type": "Precompiled", "precompiled_charsmap": charsmap},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, _METASPACE]},
        post_processor=template([], [end], {end: ids[end]}) if end in ids else None,
        decoder=_METASPACE,
    )


def in_base64(charsmap: bytes) -> str | None:
    return base64.b64encode(charsmap).decode() if charsmap else None


def charsmap_of(normalizer: Any) -> str | None:
    """Return the table in the normalizer of a `tokenizer.json`, in base64."""
    parts = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else []
    for part in parts if isinstance(parts, list) else []:
        if isinstance(part, dict) and part.get("type") == "Precompiled":
            table = part.get("precompiled_charsmap")
            return table if isinstance(table, str) else None
    return None


def _piece(content: bytes, where: str) -> tuple[str, float, int]:
    piece, score, type = "", 0.0, 1
    for number, value in _fields(content, where):
        if number == 1 and isinstance(value, bytes):
            try:
                piece = value.decode()
            except UnicodeDecodeError:
                raise TokenizerError(f"{where} has the piece {quoted(value)}, which is not UTF-8") from None
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            type = value
    if not math.isfinite(score):
        raise TokenizerError(f"{where}: the score of {quoted(piece)} is {score}")
    return piece, score, type


def _fields(content: bytes, where: str) -> Iterator[tuple[int, int | float | bytes]]:
    """Yield number and value of each field of a message: 4 bytes as a float, 8 bytes and strings as bytes."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at, where)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(content, at, where)
            yield number, value
            continue
        if wire == _LENGTH:
            size, at = _varint(content, at, where)
        elif wire in (_FOUR_BYTES, _EIGHT_BYTES):
            size = 4 if wire == _FOUR_BYTES else 8
        else:
            raise TokenizerError(f"{where} is not a SentencePiece model: a field has the wire type {wire}")
        if size > len(content) - at:
            raise TokenizerError(f"{where} is damaged: a field has {size} bytes, but {len(content) - at} are left")
        part, at = content[at : at + size], at + size
        yield number, struct.unpack("<f", part)[0] if wire == _FOUR_BYTES else part


def _varint(content: bytes, at: int, where: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at == len(content):
            raise TokenizerError(f"{where} is damaged: it ends within a number")
        byte, at = content[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise TokenizerError(f"{where} is damaged: a number has more than 10 bytes")

"""SentencePiece models: `spiece.model`, `tokenizer.model` and `sentencepiece.bpe.model`.

A model is a protocol buffer. This module reads only the fields below and checks every length in the wire format.
`sentencepiece_classes` builds tokenizers from a model.

Sources: sentencepiece_model.proto of github.com/google/sentencepiece, protobuf.dev/programming-guides/encoding, and
`SentencePieceExtractor` and `generate_merges` of transformers 5.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bridge.errors import TokenizerError, quoted
from bridge.storage.companions import MOST_TOKENS
from bridge.tokenizers.tokenizer import AddedToken

UNIGRAM, BPE = 1, 2

Pieces = list[tuple[str, float]]

_TYPES = {UNIGRAM: "Unigram", BPE: "BPE", 3: "words", 4: "characters"}
_CONTROL, _USER_DEFINED = 3, 4
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5  # wire types
_NUMBERS = {3: "model_type", 35: "byte_fallback", 40: "unk_id", 41: "bos_id", 42: "eos_id"}
_PIECES = {45: "unk_piece", 46: "bos_piece", 47: "eos_piece"}
_LONGEST_PIECE = 512
_MOST_MERGES_PER_PIECE = 16  # for comparison: Gemma's model has 2.3


@dataclass(frozen=True)
class Trainer:
    """The trainer options that this module reads, with their defaults. An id is -1 if the model lacks the token."""

    model_type: int = UNIGRAM
    byte_fallback: int = 0
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    unk_piece: str = "<unk>"
    bos_piece: str = "<s>"
    eos_piece: str = "</s>"


@dataclass(frozen=True)
class Model:
    """The parts of a SentencePiece model that decide the ids."""

    pieces: Pieces
    """(piece, score) pairs. The id of a piece is its index."""
    symbols: tuple[AddedToken, ...] = ()
    """The control pieces (special) and the user-defined pieces (not special)."""
    charsmap: bytes = b""
    """The table of the normalizer; empty if text is not normalized."""
    trainer: Trainer = field(default_factory=Trainer)


def parse(content: bytes, where: str, most: int = MOST_TOKENS) -> Model:
    """Read a model with at most `most` pieces.

    Raises `TokenizerError` for a file that is damaged, or is neither a Unigram nor a BPE model.
    """
    pieces: Pieces = []
    symbols: list[AddedToken] = []
    charsmap = b""
    options: dict[str, Any] = {}
    for number, value in _fields(content, where):
        if number == 1 and isinstance(value, bytes):
            if len(pieces) == most:
                raise TokenizerError(f"{where} has more than {most} pieces; the file does not belong to this model")
            piece, score, type = _piece(value, where)
            if type in (_CONTROL, _USER_DEFINED):
                symbols.append(AddedToken(piece, len(pieces), special=type == _CONTROL))
            pieces.append((piece, score))
        elif number == 2 and isinstance(value, bytes):
            options |= _trainer_options(value, where)
        elif number == 3 and isinstance(value, bytes):  # normalizer_spec
            tables = [v for n, v in _fields(value, where) if n == 2 and isinstance(v, bytes)]
            charsmap = tables[-1] if tables else charsmap
    trainer = Trainer(**options)
    if trainer.model_type not in (UNIGRAM, BPE):
        type_name = _TYPES.get(trainer.model_type, trainer.model_type)
        raise TokenizerError(
            f"{where} is a SentencePiece model of {type_name}; only Unigram and BPE are supported; save the "
            "tokenizer as tokenizer.json with transformers, into the same directory"
        )
    if not pieces:
        raise TokenizerError(f"{where} is not a SentencePiece model: it has no pieces")
    if len({piece for piece, _ in pieces}) < len(pieces):
        raise TokenizerError(f"{where} has a piece twice")
    return Model(pieces, tuple(symbols), charsmap, trainer)


def merges_of(pieces: Sequence[tuple[str, float]], where: str) -> list[tuple[str, str]]:
    """Return the merges of a BPE model: every pair of pieces that joins to a piece, in the order of the result's id.

    Raises `TokenizerError` if a piece is too long, or if there are too many merges.
    """
    own = {piece: piece for piece, _ in pieces}  # merges share their strings
    merges: list[tuple[str, str]] = []
    for piece in own:
        if len(piece) > _LONGEST_PIECE:
            raise TokenizerError(
                f"{where}: the piece {quoted(piece)} has {len(piece)} characters; the limit is {_LONGEST_PIECE}"
            )
        for at in range(1, len(piece)):
            if (left := own.get(piece[:at])) is not None and (right := own.get(piece[at:])) is not None:
                merges.append((left, right))
        if len(merges) > _MOST_MERGES_PER_PIECE * len(pieces):
            raise TokenizerError(f"{where}: the {len(pieces)} pieces have more than {len(merges) - 1} merges")
    return merges


def _trainer_options(content: bytes, where: str) -> dict[str, Any]:
    """Return the fields of `Trainer` that a trainer_spec states."""
    options: dict[str, Any] = {}
    for number, value in _fields(content, where):
        if number in _NUMBERS and isinstance(value, int):
            options[_NUMBERS[number]] = (value + 2**31) % 2**32 - 2**31  # int32, sign-extended to 64 bits
        elif number in _PIECES and isinstance(value, bytes):
            options[_PIECES[number]] = _text(value, where)
    return options


def _piece(content: bytes, where: str) -> tuple[str, float, int]:
    piece, score, type = "", 0.0, 1
    for number, value in _fields(content, where):
        if number == 1 and isinstance(value, bytes):
            piece = _text(value, where)
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            type = value
    if not math.isfinite(score):
        raise TokenizerError(f"{where}: the score of {quoted(piece)} is {score}")
    return piece, score, type


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise TokenizerError(f"{where} has the piece {quoted(content)}, which is not UTF-8") from None


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

"""The GGUF container: typed metadata and tensors, read one tensor at a time and written as a stream.

Format: magic, version, two counts, keys with values, descriptions of the tensors, padding, data; all little-endian.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Where the description is ambiguous, this module follows
llama.cpp's reader (ggml/src/gguf.cpp): no arrays of arrays; tensors in the order of their descriptions, with only
padding between them. The `gguf` package is not used: importing it takes half a second and brings three more packages.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bridge.errors import CheckpointError, quoted
from bridge.storage.dtypes import SAFETENSORS_DTYPES
from bridge.storage.regular_file import first_bytes
from bridge.storage.stored_file import StoredFile, write_array
from bridge.storage.tensors import LazyTensorMap

DTYPES: Mapping[str, np.dtype] = {name: SAFETENSORS_DTYPES[name] for name in ("F32", "F16", "BF16")}
"""The element types that are read and written, by ggml's names."""

# enum ggml_type, in order; "-" for removed types. Unsupported types are listed for error messages.
_TENSOR_TYPES_IN_ORDER = (
    "F32 F16 Q4_0 Q4_1 - - Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S "
    "IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 - - - TQ1_0 TQ2_0 - - - MXFP4 NVFP4 Q1_0"
)
_TENSOR_TYPES = _TENSOR_TYPES_IN_ORDER.split()
_TYPE_NUMBERS = {DTYPES[name]: number for number, name in enumerate(_TENSOR_TYPES) if name in DTYPES}
_UNQUANTISED = {"I8", "I16", "I32", "I64", "F64"}

# enum gguf_metadata_value_type: the name, and the format character of `struct`.
_SCALARS = {
    0: ("uint8", "B"),
    1: ("int8", "b"),
    2: ("uint16", "H"),
    3: ("int16", "h"),
    4: ("uint32", "I"),
    5: ("int32", "i"),
    6: ("float32", "f"),
    7: ("bool", "B"),
    10: ("uint64", "Q"),
    11: ("int64", "q"),
    12: ("float64", "d"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # version 3 only adds big-endian files
_ALIGNMENT = 32  # the default of general.alignment
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
_MOST_NAME_BYTES = 63  # GGML_MAX_NAME without the terminating zero
_MOST_KEY_BYTES = 2**16 - 1

# Limits on the cost of a malicious file, which may be sparse. A GPT-2 needs far less.
_MOST_HEADER_BYTES = 2**24  # a vocabulary of 50,257 takes 2 MB
_MOST_KEYS = 2**12
_MOST_TENSORS = 2**14
_MOST_STRINGS = 2**19  # in all arrays together; GPT-2 has 100,257 tokens and merges
_BLOCK_BYTES = 2**17


@dataclass(frozen=True)
class Array:
    """An array of the metadata. Its entries are read on access."""

    type: str
    """Type of the entries: "string", "int32" ..."""
    count: int
    _file: StoredFile
    _offset: int
    _nbytes: int

    def read(self) -> list[Any]:
        """Return the entries. Strings are UTF-8 bytes."""
        content = self._file.read(self._offset, self._nbytes)
        if self.type != "string":
            letter = dict(_SCALARS.values())[self.type]
            return list(struct.unpack(f"<{self.count}{letter}", content))
        strings, position = [], 0
        for _ in range(self.count):
            begin = position + 8
            position = begin + int.from_bytes(content[position:begin], "little")
            strings.append(content[begin:position])
        return strings


Value: TypeAlias = int | float | bool | bytes | Array
"""The value of a key. A string is UTF-8 bytes that have not been validated."""


@dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file: its metadata, and its tensors on demand."""

    file: StoredFile
    metadata: Mapping[str, Value]
    _tensor_count: int
    _tensors_described_at: int

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Read the metadata, without its arrays. Counts and lengths are validated against the size of the file first.

        Raises `CheckpointError` if the file is damaged, or is not little-endian GGUF of version 2 or 3.
        """
        cursor = _Cursor(StoredFile.open(path))
        tensor_count, key_count = _counts(cursor)
        metadata: dict[str, Value] = {}
        for number in range(key_count):
            cursor.field = f"key {number + 1} of {key_count}"
            key = cursor.string(_MOST_KEY_BYTES)
            if not key or not key.isascii():
                raise cursor.refusal(f"{shown(key)} is not an ASCII name")
            cursor.field = quoted(key.decode())
            if key.decode() in metadata:
                raise cursor.refusal("appears twice")
            metadata[key.decode()] = _value(cursor)
        return cls(cursor.file, metadata, tensor_count, cursor.position)

    def tensors(self) -> LazyTensorMap:
        """Return the tensors, each read on access, with axes in numpy's order: the last axis is the innermost.

        Raises `CheckpointError` for types that are not in `DTYPES`, and for tensors that overlap, leave holes or are
        outside the file.
        """
        cursor = _Cursor(self.file, self._tensors_described_at)
        described: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        alignment, end = self._alignment(), 0
        for number in range(self._tensor_count):
            cursor.field = f"tensor {number + 1} of {self._tensor_count}"
            name = _name(cursor)
            cursor.field = f"tensor {quoted(name)}"
            if name in described:
                raise cursor.refusal("appears twice")
            shape, dtype, offset = _shape(cursor), _dtype(cursor), cursor.number(8)
            if offset != end:
                raise cursor.refusal(
                    f"starts at byte {offset} of the data instead of {quoted(end)}; the file is damaged"
                )
            described[name] = dtype, shape
            end = offset + _padded(math.prod(shape) * dtype.itemsize, alignment)
        start = _padded(cursor.position, alignment)
        if self.file.size > start + end:  # the file may be shorter: the last tensor need not be padded
            trailing = self.file.size - start - end
            raise CheckpointError(
                f"{quoted(self.file.path)}: {trailing} bytes after the last tensor; the file is damaged"
            )
        entries = {}
        for name, (dtype, shape) in described.items():
            entries[name] = self.file.entry(dtype, shape, start)
            start += _padded(entries[name].nbytes, alignment)
        return LazyTensorMap(entries)

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 8 or alignment.bit_count() != 1:
            raise CheckpointError(
                f"{quoted(self.file.path)}: general.alignment is {shown(alignment)}, not a power of two of at least 8"
            )
        return alignment


def shown(value: Value | None) -> str:
    """Format a value of the metadata for a message. None is a missing value."""
    if isinstance(value, Array):
        return f"an array of {value.count}"
    return "missing" if value is None else quoted(value.decode(errors="replace") if isinstance(value, bytes) else value)


def is_gguf(path: Path) -> bool:
    """Whether a file starts with GGUF's magic number. Returns False for an unreadable file."""
    return first_bytes(path, len(_MAGIC)) == _MAGIC


def write_file(path: str | Path, metadata: Mapping[str, bytes], tensors: LazyTensorMap) -> None:
    """Write GGUF version 3. At most one tensor is in memory at a time.

    Args:
        metadata: key -> value, encoded by `uint32`, `float32`, `string`, `int32s` or `strings`.
        tensors: tensors of the types in `DTYPES`.
    """
    header = bytearray(_MAGIC + struct.pack("<IQQ", _VERSIONS[-1], len(tensors), len(metadata)))
    for key, value in metadata.items():
        header += _sized(key) + value
    position = 0
    for name, entry in tensors.entries.items():
        if entry.dtype not in _TYPE_NUMBERS:
            raise CheckpointError(
                f"{quoted(name)}: GGUF cannot hold {entry.dtype}; supported types are {', '.join(DTYPES)}"
            )
        rank = len(entry.shape)
        header += _sized(name) + struct.pack(
            f"<I{rank}QIQ", rank, *reversed(entry.shape), _TYPE_NUMBERS[entry.dtype], position
        )
        position += _padded(entry.nbytes, _ALIGNMENT)
    if len(tensors) > _MOST_TENSORS or len(header) > _MOST_HEADER_BYTES:
        raise CheckpointError(
            f"{len(tensors)} tensors and a header of {len(header)} bytes exceed the limits for reading, "
            f"{_MOST_TENSORS} and {_MOST_HEADER_BYTES}"
        )
    with open(path, "xb") as file:
        file.write(header + bytes(-len(header) % _ALIGNMENT))
        for name, entry in tensors.entries.items():
            write_array(file, name, entry)
            file.write(bytes(-entry.nbytes % _ALIGNMENT))


def uint32(value: int) -> bytes:
    """Encode a value of the metadata, with its type in front. The next five functions do the same for other types."""
    return struct.pack("<II", 4, value)


def float32(value: float) -> bytes:
    return struct.pack("<If", 6, value)


def boolean(value: bool) -> bytes:
    return struct.pack("<IB", _BOOL, value)


def string(text: str) -> bytes:
    return struct.pack("<I", _STRING) + _sized(text)


def int32s(values: Sequence[int]) -> bytes:
    return struct.pack(f"<IIQ{len(values)}i", _ARRAY, 5, len(values), *values)


def strings(texts: Sequence[str]) -> bytes:
    return struct.pack("<IIQ", _ARRAY, _STRING, len(texts)) + b"".join(map(_sized, texts))


def _sized(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


class _Cursor:
    """A position in the header. Reads in blocks, because `StoredFile` opens the file for each read."""

    def __init__(self, file: StoredFile, position: int = 0) -> None:
        self.file = file
        self.position = position
        self.field = "the header"
        """The field that is being read, for messages."""
        self.strings = 0
        """Number of strings in arrays so far."""
        self._block = b""
        self._block_start = 0

    def refusal(self, why: str) -> CheckpointError:
        return CheckpointError(f"{quoted(self.file.path)}: {self.field}: {why}")

    def require(self, count: int) -> None:
        """Raise unless `count` more bytes exist and fit into the largest allowed header."""
        if count > self.file.size - self.position:
            raise self.refusal(
                f"{quoted(count)} bytes from {self.position} exceed the file's {self.file.size}; it is damaged or "
                "truncated"
            )
        if count > _MOST_HEADER_BYTES - self.position:
            raise self.refusal(f"the header is larger than the limit of {_MOST_HEADER_BYTES} bytes")

    def skip(self, count: int) -> None:
        self.require(count)
        self.position += count

    def take(self, count: int) -> bytes:
        start = self.position
        self.skip(count)
        if self.position > self._block_start + len(self._block):
            self._block = self.file.read(start, max(count, min(_BLOCK_BYTES, self.file.size - start)))
            self._block_start = start
        return self._block[start - self._block_start : self.position - self._block_start]

    def number(self, width: int) -> int:
        """Read an unsigned integer of `width` bytes."""
        return int.from_bytes(self.take(width), "little")

    def string(self, most: int = _MOST_HEADER_BYTES) -> bytes:
        length = self.number(8)
        self.require(length)
        if length > most:
            raise self.refusal(f"a name of {length} bytes; the limit is {most}")
        return self.take(length)


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """Read the number of tensors and the number of keys."""
    if cursor.take(len(_MAGIC)) != _MAGIC:
        raise cursor.refusal("this is not a GGUF file")
    version = cursor.number(4)
    if version and not version & 0xFFFF:
        raise cursor.refusal("this GGUF file is big-endian; convert it with gguf-convert-endian of the package gguf")
    if version not in _VERSIONS:
        raise cursor.refusal(
            f"GGUF version {version}; only versions {' and '.join(map(str, _VERSIONS))} are supported; convert the "
            "original model again with a current llama.cpp"
        )
    tensors, keys = cursor.number(8), cursor.number(8)
    for count, most, what in ((tensors, _MOST_TENSORS, "tensors"), (keys, _MOST_KEYS, "keys")):
        if count > most:
            raise cursor.refusal(f"declares {count} {what}; the limit is {most}")
    return tensors, keys


def _value(cursor: _Cursor) -> Value:
    type = cursor.number(4)
    if type == _STRING:
        return cursor.string()
    if type == _ARRAY:
        return _array(cursor)
    if type not in _SCALARS:
        raise cursor.refusal(f"has a value of the unknown type {type}")
    letter = "<" + _SCALARS[type][1]
    value: int | float = struct.unpack(letter, cursor.take(struct.calcsize(letter)))[0]
    if type != _BOOL:
        return value
    if value not in (0, 1):
        raise cursor.refusal(f"is a bool with the value {value}")
    return bool(value)


def _array(cursor: _Cursor) -> Array:
    type, count = cursor.number(4), cursor.number(8)
    start = cursor.position
    if type in _SCALARS:
        name, letter = _SCALARS[type]
        cursor.skip(count * struct.calcsize(f"<{letter}"))
    elif type == _STRING:
        name = "string"
        cursor.require(8 * count)
        cursor.strings += count
        if cursor.strings > _MOST_STRINGS:
            raise cursor.refusal(f"arrays up to here have {cursor.strings} strings; the limit is {_MOST_STRINGS}")
        for _ in range(count):
            cursor.skip(cursor.number(8))
    else:
        raise cursor.refusal(f"is an array of type {type}; only arrays of numbers and of strings are supported")
    return Array(name, count, cursor.file, start, cursor.position - start)


def _name(cursor: _Cursor) -> str:
    name = cursor.string(_MOST_NAME_BYTES)
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise cursor.refusal(f"its name {shown(name)} is not UTF-8") from None


def _shape(cursor: _Cursor) -> tuple[int, ...]:
    """Read a shape. ggml lists the innermost axis first, numpy the outermost."""
    rank = cursor.number(4)
    if not 1 <= rank <= _MOST_DIMENSIONS:
        raise cursor.refusal(f"has {rank} dimensions, not 1 to {_MOST_DIMENSIONS}")
    return struct.unpack(f"<{rank}Q", cursor.take(8 * rank))[::-1]


def _dtype(cursor: _Cursor) -> np.dtype:
    number = cursor.number(4)
    name = _TENSOR_TYPES[number] if number < len(_TENSOR_TYPES) else "-"
    if name in DTYPES:
        return DTYPES[name]
    if name == "-" or name in _UNQUANTISED:
        what = f"ggml's type {number}" if name == "-" else name
        raise cursor.refusal(f"holds {what}; supported types are {', '.join(DTYPES)}")
    raise cursor.refusal(
        f"has the quantised type {name}, which is not supported; convert the original model, or dequantise with "
        "llama.cpp (llama-quantize --allow-requantize IN.gguf OUT.gguf F16)"
    )


def _padded(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment

"""Read TensorFlow checkpoints of version 2 ("tensor bundles") without TensorFlow.

A bundle is `PREFIX.index` and `PREFIX.data-*-of-*`. The index is a LevelDB table (github.com/google/leveldb,
doc/table_format.md) whose values are protocol buffers. The data files hold the tensors one after the other. Every block
of the index and every tensor has a CRC-32C.
Source: tensorflow/core/util/tensor_bundle and core/protobuf/tensor_bundle.proto.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import google_crc32c
import numpy as np

from bridge.errors import CheckpointError, quoted
from bridge.storage.dtypes import TENSORFLOW_DTYPES
from bridge.storage.stored_file import StoredFile
from bridge.storage.tensors import MOST_RANK, LazyTensor, LazyTensorMap

MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
"""The last bytes of the index."""

_CHUNK = 2**20
"""Number of bytes added to a checksum at a time."""

_FOOTER = 48
_TRAILER = 5  # bytes after a block: compression type and checksum
# The index of gpt2-xl with Adam's slots has 150 kB and 1,743 tensors. Names are limited because each shares a prefix
# with the previous one: three bytes of the file could produce a name of megabytes.
_MOST_INDEX_BYTES = 2**20
_MOST_TENSORS = 4_000
_MOST_NAME_BYTES = 1_024
_MOST_SHARDS = 1_000
_VERSION = 1  # VersionDef in the header; no other version exists

_Fields = dict[int, list[int | bytes]]
"""A protocol buffer: field number -> values."""


def is_index(path: Path) -> bool:
    """Whether a file ends like an index. Returns False for an unreadable file."""
    try:
        file = StoredFile.open(path)
        return file.size >= len(MAGIC) and file.read(file.size - len(MAGIC), len(MAGIC)) == MAGIC
    except CheckpointError:
        return False


def read_bundle(index: Path) -> LazyTensorMap:
    """Return the tensors of `PREFIX.index`. Each is read and verified against its checksum on access."""
    file = StoredFile.open(index)
    if not _FOOTER <= file.size <= _MOST_INDEX_BYTES:
        raise CheckpointError(
            f"{quoted(index)}: {file.size} bytes; the index of a GPT-2 has from {_FOOTER} to {_MOST_INDEX_BYTES}"
        )
    table = _Table(file.path, file.read(0, file.size))
    shards: dict[int, StoredFile] | None = None
    entries: dict[str, LazyTensor] = {}
    spans: list[tuple[int, int, int, str]] = []
    for key, value in table.entries():
        if shards is None:  # the first entry is BundleHeaderProto, with an empty name
            shards = _shards(file.path, table.message(value) if key == b"" else {}, table)
            continue
        if len(entries) >= _MOST_TENSORS:
            raise CheckpointError(f"{quoted(index)}: more than {_MOST_TENSORS} tensors")
        name = key.decode("utf-8", "backslashreplace")
        fields = table.message(value)
        entries[name] = _entry(table, name, fields, shards)
        spans.append((table.number(fields, 3), table.number(fields, 4), entries[name].nbytes, name))
    _require_disjoint(spans, shards or {})
    return LazyTensorMap(entries)


def _shards(index: Path, header: _Fields, table: _Table) -> dict[int, StoredFile]:
    """Open the data files. Their names follow from the name of the index and their number, not from file content."""
    count, endianness = table.number(header, 1), table.number(header, 2)
    if endianness != 0:
        raise table.damaged("was written on a big-endian machine; save it again on a little-endian one")
    version = table.message(table.bytes_of(header, 3))
    if table.number(version, 2) > _VERSION or 3 in version:  # min_consumer, bad_consumers
        raise table.damaged("has a later checkpoint version; save it with TensorFlow 2")
    if not 1 <= count <= _MOST_SHARDS:
        raise table.damaged(f"declares {count} data files, not 1 to {_MOST_SHARDS}")
    prefix = index.name.removesuffix(".index")
    return {k: StoredFile.open(index.parent / f"{prefix}.data-{k:05d}-of-{count:05d}") for k in range(count)}


def masked_crc32c(content: bytes | memoryview) -> int:
    """Return the CRC-32C of `content`, masked as LevelDB stores it (util/crc32c.h).

    LevelDB masks stored CRCs because the CRC of data that contains CRCs is weak.
    """
    crc = 0
    for start in range(0, len(content), _CHUNK):  # the package takes only `bytes`, so each chunk is copied
        crc = google_crc32c.extend(crc, bytes(content[start : start + _CHUNK]))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFF_FFFF


def _entry(table: _Table, name: str, fields: _Fields, shards: Mapping[int, StoredFile]) -> LazyTensor:
    """Return the tensor of a BundleEntryProto."""
    kind, shard, offset, size = (table.number(fields, field) for field in (1, 3, 4, 5))
    if 7 in fields:
        raise table.damaged(f"holds {quoted(name)}, a partitioned variable; save it without partitions")
    if kind not in TENSORFLOW_DTYPES:
        raise table.damaged(
            f"holds {quoted(name)} of TensorFlow's data type {kind}; save only the variables of the model"
        )
    if shard not in shards:
        raise table.damaged(f"puts {quoted(name)} in data file {shard}; the data files are 0 to {len(shards) - 1}")
    dtype, shape = TENSORFLOW_DTYPES[kind], _shape(table, name, fields)
    if math.prod(shape) * dtype.itemsize != size:
        raise table.damaged(
            f"has {size} bytes for {quoted(name)}, which do not fit its shape {quoted(shape)} and {dtype}"
        )
    stored = shards[shard].entry(dtype, shape, offset)
    expected = table.number(fields, 6)

    def read() -> np.ndarray:
        array = stored.read()
        if masked_crc32c(array.reshape(-1).view(np.uint8).data) != expected:
            raise CheckpointError(
                f"{quoted(shards[shard].path)} is damaged: {quoted(name)} does not match its checksum"
            )
        return array

    return LazyTensor(dtype, shape, read)


def _require_disjoint(spans: list[tuple[int, int, int, str]], shards: Mapping[int, StoredFile]) -> None:
    """Raise `CheckpointError` if tensors overlap or bytes follow the last one. Gaps for alignment are allowed.

    Args:
        spans: data file, offset, size in bytes and name of each tensor.
    """
    ends = dict.fromkeys(shards, 0)
    for shard, offset, nbytes, name in sorted(spans):
        if offset < ends[shard]:
            raise CheckpointError(f"{quoted(shards[shard].path)}: {quoted(name)} overlaps the tensor before it")
        ends[shard] = offset + nbytes
    for shard, end in ends.items():
        if end != shards[shard].size:
            raise CheckpointError(
                f"{quoted(shards[shard].path)}: {shards[shard].size - end} bytes after the last tensor; the file "
                "is damaged, or belongs to another checkpoint than the index"
            )


def _shape(table: _Table, name: str, fields: _Fields) -> tuple[int, ...]:
    """Return the shape in a TensorShapeProto."""
    shape = table.message(table.bytes_of(fields, 2))
    dims = [table.number(table.message(dim), 1) for dim in shape.get(2, ()) if isinstance(dim, bytes)]
    if len(dims) > MOST_RANK or 3 in shape or any(dim >= 2**63 for dim in dims):
        raise table.damaged(f"holds {quoted(name)}, which has an invalid shape")
    return tuple(dims)


class _Table:
    """A LevelDB table, in memory."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self._content = path, content

    def entries(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield keys and values. Keys are ordered and unique."""
        footer = len(self._content) - _FOOTER
        if self._content[-8:] != MAGIC:
            raise self.damaged("does not end like an index; it is truncated, or another kind of file")
        _, position = self._handle(self._content, footer)  # of the metaindex, which is unused
        index, _ = self._handle(self._content, position)
        last: bytes | None = None
        used = 0
        for _, value in self._block(index):
            handle, _ = self._handle(value, 0)
            used += handle[1]
            if used > len(self._content):  # otherwise one block could be read once per handle
                raise self.damaged("has blocks that overlap or exceed the file")
            for key, entry in self._block(handle):
                if last is not None and key <= last:
                    raise self.damaged("has names that are unordered or repeated")
                last = key
                yield key, entry

    def message(self, content: bytes) -> _Fields:
        """Return the raw fields of a protocol buffer. https://protobuf.dev/programming-guides/encoding"""
        fields: _Fields = {}
        position = 0
        while position < len(content):
            tag, position = self._varint(content, position)
            value: int | bytes
            match tag & 7:
                case 0:
                    value, position = self._varint(content, position)
                case 2:
                    length, position = self._varint(content, position)
                    value, position = self._take(content, position, length), position + length
                case 5:
                    value = int.from_bytes(self._take(content, position, 4), "little")
                    position += 4
                case _:
                    raise self.damaged("has a value that is not a protocol buffer of TensorFlow")
            fields.setdefault(tag >> 3, []).append(value)
        return fields

    def number(self, fields: _Fields, field: int) -> int:
        """Return a number; 0 if the field is absent."""
        values = fields.get(field, [0])
        if len(values) != 1 or isinstance(values[0], bytes):
            raise self.damaged(f"has a value whose field {field} is not one number")
        return values[0]

    def bytes_of(self, fields: _Fields, field: int) -> bytes:
        values = fields.get(field, [b""])
        if len(values) != 1 or not isinstance(values[0], bytes):
            raise self.damaged(f"has a value whose field {field} is not one message")
        return values[0]

    def damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{quoted(self.path)} {why}")

    def _block(self, handle: tuple[int, int]) -> Iterator[tuple[bytes, bytes]]:
        """Yield the entries of a block. Each key is stored without the prefix that it shares with the previous key."""
        offset, size = handle
        block = self._take(self._content, offset, size + _TRAILER)
        if masked_crc32c(block[:-4]) != int.from_bytes(block[-4:], "little"):
            raise self.damaged(f"is damaged: the block at {offset} does not match its checksum")
        if block[size] != 0:
            raise self.damaged("has compressed blocks, which TensorFlow does not write; save it with TensorFlow")
        restarts = int.from_bytes(self._take(block, size - 4, 4), "little")
        end = size - 4 - 4 * restarts
        position, key = 0, b""
        while position < end:
            shared, position = self._varint(block, position)
            added, position = self._varint(block, position)
            length, position = self._varint(block, position)
            if shared > len(key) or position + added + length > end:
                raise self.damaged("has an entry that exceeds its block")
            if shared + added > _MOST_NAME_BYTES:
                raise self.damaged(f"has a name of more than {_MOST_NAME_BYTES} bytes")
            key = key[:shared] + block[position : position + added]
            position += added
            yield key, block[position : position + length]
            position += length
        if position != end:
            raise self.damaged("has a block whose size differs from its entries")

    def _handle(self, content: bytes, position: int) -> tuple[tuple[int, int], int]:
        offset, position = self._varint(content, position)
        size, position = self._varint(content, position)
        return (offset, size), position

    def _varint(self, content: bytes, position: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 64, 7):
            byte = self._take(content, position, 1)[0]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
        raise self.damaged("has a number of more than 64 bits")

    def _take(self, content: bytes, position: int, count: int) -> bytes:
        if not 0 <= position <= position + count <= len(content):
            raise self.damaged("is damaged or truncated: it refers to bytes outside of the file")
        return content[position : position + count]

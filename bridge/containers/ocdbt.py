"""The arrays of an Orbax checkpoint, validated before tensorstore reads them.

Orbax stores zarr arrays in an OCDBT database: a manifest, and a tree of nodes that map each key to a range of a file.
tensorstore trusts all of it. A small node or chunk may decompress to gigabytes, an array may declare a size that aborts
the process, nodes may form a cycle, and a key may refer to a file outside the directory. `open_arrays` walks the tree
with limits, and rejects any structure that Orbax does not write.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bridge.containers.zstd_frame import largest_content
from bridge.errors import CheckpointError, quoted
from bridge.storage.dtypes import DTYPES
from bridge.storage.json_text import parse_object
from bridge.storage.regular_file import read_small_file

_DTYPES = {
    name: DTYPES[name]
    for name in ("bool", "uint8", "int32", "uint32", "int64", "float16", "float32", "float64", "bfloat16")
}
_MANIFEST, _MOST_MANIFEST_BYTES = "manifest.ocdbt", 2**20
_MOST_TREE_BYTES, _MOST_NODES, _MOST_KEYS, _MOST_KEY_BYTES = 2**24, 1000, 200_000, 512
"""Limits on the whole tree; bytes are decompressed bytes. A node holds about 1 kB of metadata for each array."""
_MOST_DESCRIPTION_BYTES = 2**14
_HEADER = 14
"""Bytes of a node's header: magic, length, version and compression method."""
_LOCATION = re.compile(r"(btreenode|value):([\w./-]*):([\w./-]+):(\d{1,19}):(\d{1,19})", re.ASCII)
_KEY = re.compile(r"([\w.-]+)/(zarr\.json|c(?:/\d{1,9}){0,16})", re.ASCII)
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_INDEX_CODECS = [_BYTES, {"name": "crc32c"}]
_INDEX_BYTES = 8 + 8 + 4
"""Size of the index of a shard with one chunk: the chunk's offset and size, and a checksum."""
_SLACK = 2**20


@dataclass(frozen=True)
class _Piece:
    """A value of the database: a range of a file, or bytes stored inline in the tree."""

    file: Path | None
    offset: int
    size: int
    inline: bytes = b""

    def read(self) -> bytes:
        with self.opened() as read:
            return read(0, self.size)

    @contextmanager
    def opened(self) -> Iterator[Callable[[int, int], bytes]]:
        """Yield a function `read(start, count)` that returns up to `count` bytes, fewer at the end of the piece."""
        if self.file is None:
            yield lambda start, count: self.inline[start : start + count]
            return
        with open(self.file, "rb", buffering=0) as file:

            def read(start: int, count: int) -> bytes:
                file.seek(self.offset + start)
                return file.read(max(0, min(count, self.size - start)))

            yield read

    def part(self, start: int, stop: int) -> _Piece:
        return _Piece(self.file, self.offset + start, max(0, stop - start), self.inline[start:stop])

    def largest_content(self, most: int) -> int | None:
        """Return an upper bound on the decompressed size; see `bridge.containers.zstd_frame.largest_content`."""
        with self.opened() as read:
            return largest_content(read, self.size, most)


@dataclass(frozen=True)
class StoredArray:
    """One array of the database. tensorstore opens it on the first read."""

    state: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @cached_property
    def _array(self) -> Any:
        import tensorstore

        # Training may remove a checkpoint during a read. A missing chunk must be an error, not zeros.
        spec = {"driver": "zarr3", "fill_missing_data_reads": False}
        return tensorstore.open({**spec, "kvstore": {**_database(self.state), "path": f"{self.name}/"}}).result()

    def read(self, index: Any = ...) -> np.ndarray:
        """Return the array or a part of it. Raises `CheckpointError` if it cannot be read."""
        try:
            return np.asarray(self._array[index].read().result(), order="C")
        except (ValueError, OSError, IndexError) as error:
            raise _unreadable(self.state, str(error).partition("\n")[0]) from error


def open_arrays(state: Path) -> dict[str, StoredArray]:
    """Return every array of a saved state by name, such as `params.wte.embedding`, without reading any.

    Raises `CheckpointError` for a database that does not have the structure that Orbax writes.
    """
    try:
        arrays = dict(_arrays(state))
    except OSError as error:
        raise _unreadable(state, error.strerror or str(error)) from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        # CheckpointError is a ValueError with a better message; the other errors come from malformed metadata.
        raise error if isinstance(error, CheckpointError) else _unreadable(state, str(error)) from error
    return arrays


def _database(state: Path) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{state}/"}}


def _arrays(state: Path) -> Iterator[tuple[str, StoredArray]]:
    grouped: dict[str, dict[str, _Piece]] = {}
    for key, piece in _entries(state):
        match = _KEY.fullmatch(key.decode("ascii", "replace"))
        if match is None or len(key) > _MOST_KEY_BYTES:
            raise _unreadable(state, f"the key {quoted(key)} does not belong to an array")
        grouped.setdefault(match[1], {})[match[2]] = piece
    seen: set[_Piece] = set()
    for name, pieces in sorted(grouped.items()):
        where = f"{quoted(state)}: {quoted(name)}"
        if "zarr.json" not in pieces:
            raise CheckpointError(f"{where} has no zarr.json; use another checkpoint of the run")
        description = pieces.pop("zarr.json")
        if description.size > _MOST_DESCRIPTION_BYTES:
            raise CheckpointError(f"{where} has a zarr.json of {description.size} bytes")
        fields = parse_object(description.read(), where, CheckpointError)
        metadata = _Metadata.of(fields, where)
        for chunk, piece in pieces.items():
            if piece in seen:  # tensorstore writes no value twice
                raise CheckpointError(
                    f"{where} and another array have the same chunk; use another checkpoint of the run"
                )
            if piece.file is not None:
                seen.add(piece)
            metadata.require_chunk(chunk, piece, where)
        yield name, StoredArray(state, name, metadata.shape, metadata.dtype)


# The tree of keys.


def _entries(state: Path) -> Iterator[tuple[bytes, _Piece]]:
    """Yield each key and the location of its value."""
    import tensorstore

    manifest = state / _MANIFEST
    content = read_small_file(manifest, _MOST_MANIFEST_BYTES, CheckpointError)
    _require_small(_Piece(None, 0, len(content), content), _MOST_MANIFEST_BYTES, manifest)
    base = tensorstore.KvStore.open({"driver": "file", "path": f"{state}/"}).result()
    versions = tensorstore.ocdbt.dump(base).result()["versions"]
    root = versions[-1]["root"] if versions else {}
    waiting = [root["location"]] if "location" in root else []
    remaining, keys, nodes = _MOST_TREE_BYTES, 0, 0
    while waiting:
        location = waiting.pop()
        remaining -= _require_small(_piece(state, location, "btreenode"), remaining, state)
        for entry in tensorstore.ocdbt.dump(base, location).result()["entries"]:
            if "location" in entry:
                waiting.append(entry["location"])
                continue
            keys += 1
            inline = entry.get("inline_value")
            if inline is None:
                yield entry["key"], _piece(state, entry["indirect_value"], "value")
            else:
                yield entry["key"], _Piece(None, 0, len(inline), inline)
        nodes += 1
        if nodes + len(waiting) > _MOST_NODES or keys > _MOST_KEYS:  # nodes may form a cycle
            raise _unreadable(state, "its tree has too many nodes or keys")


def _piece(state: Path, location: str, kind: str) -> _Piece:
    """Return the file range that a location names. It must be in the directory."""
    match = _LOCATION.fullmatch(location)
    name = match[2] + match[3] if match else ""
    if match is None or match[1] != kind or any(part in ("", ".", "..") for part in name.split("/")):
        raise _unreadable(state, f"{quoted(location)} is not a location in the directory")
    path, offset, size = state / name, int(match[4]), int(match[5])
    for folder in itertools.takewhile(lambda folder: folder != state, path.parents):
        if folder.is_symlink():
            raise _unreadable(state, f"{quoted(folder)} is a link")
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode) or offset + size > status.st_size:
        raise _unreadable(state, f"{quoted(location)} is not inside a file")
    return _Piece(path, offset, size)


def _require_small(node: _Piece, most: int, where: Path) -> int:
    """Return an upper bound on a node's decompressed size. Raises if it exceeds `most` bytes."""
    header = node.part(0, min(_HEADER, node.size)).read()
    size: int | None = node.size
    if len(header) < _HEADER or header[12] or header[13] > 1:  # version, compression method
        raise _unreadable(where, "a node of its tree is damaged")
    if header[13] == 1:  # zstd
        size = node.part(_HEADER, node.size - 4).largest_content(most)
    if size is None or max(size, node.size) > most:
        raise _unreadable(where, "a node of its tree is damaged or too large")
    return size


# The metadata of an array.


@dataclass(frozen=True)
class _Metadata:
    """An array as its `zarr.json` describes it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    """Shape of the block that one key stores."""
    is_sharded: bool
    is_compressed: bool

    @classmethod
    def of(cls, fields: Mapping[str, Any], where: str) -> _Metadata:
        dtype = fields.get("data_type")
        shape = _sizes(fields.get("shape"), None, where)
        grid = fields.get("chunk_grid")
        chunk = _sizes(_configuration(grid, "regular", {"chunk_shape"}, where)["chunk_shape"], shape, where)
        codecs = fields.get("codecs")
        only = codecs[0] if isinstance(codecs, list) and len(codecs) == 1 else None
        is_sharded = isinstance(only, dict) and only.get("name") == "sharding_indexed"
        if is_sharded:
            shard = _configuration(
                only, "sharding_indexed", {"chunk_shape", "codecs", "index_codecs", "index_location"}, where
            )
            codecs = shard.get("codecs")
            if _sizes(shard.get("chunk_shape"), chunk, where) != chunk:
                raise CheckpointError(f"{where} has several chunks per shard; Orbax writes one")
            if shard.get("index_codecs") != _INDEX_CODECS or shard.get("index_location", "end") != "end":
                raise CheckpointError(f"{where} has a shard index that Orbax does not write")
        others = {name: value for name, value in fields.items() if name not in ("chunk_grid", "codecs", "shape")}
        fill = others.pop("fill_value", 0)
        expected = {"chunk_key_encoding": {"name": "default"}, "data_type": dtype, "node_type": "array"}
        if {**others, "attributes": {}} != {**expected, "zarr_format": 3, "attributes": {}} or isinstance(
            fill, list | dict
        ):
            raise CheckpointError(f"{where} has a zarr.json that Orbax does not write")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise CheckpointError(f"{where} has dtype {quoted(dtype)}; supported are {', '.join(_DTYPES)}")
        return cls(shape, _DTYPES[dtype], chunk, is_sharded, _is_compressed(codecs, where))

    def require_chunk(self, key: str, piece: _Piece, where: str) -> None:
        """Raise if a chunk is outside the array's shape or decompresses to more than its share of the array."""
        indices = [int(index) for index in key.split("/")[1:]]
        if len(indices) != len(self.shape) or any(
            index * step >= max(size, 1) for index, step, size in zip(indices, self.chunk, self.shape, strict=True)
        ):
            raise CheckpointError(f"{where} has a chunk {quoted(key)} outside its shape {self.shape}")
        nbytes, index_bytes = math.prod(self.chunk) * self.dtype.itemsize, _INDEX_BYTES * self.is_sharded
        if self.is_compressed:
            end = piece.size - index_bytes
            if self.is_sharded:
                offset, size, _ = struct.unpack("<QQI", piece.part(end, piece.size).read().rjust(index_bytes, b"\0"))
                end = end if (offset, size) == (0, end) else -1
            # A block of 128 KiB may be split into sixteen parts, and headers bound each part only by 128 KiB.
            largest = piece.part(0, end).largest_content(nbytes) if end > 0 else None
            is_valid = largest is not None and largest <= 16 * nbytes + _SLACK
        else:
            is_valid = piece.size == nbytes + index_bytes
        if not is_valid:
            raise CheckpointError(f"{where}: its chunk {quoted(key)} is damaged; use another checkpoint of the run")


def _configuration(value: Any, name: str, allowed: set[str], where: str) -> dict[str, Any]:
    """Return the configuration of a metadata field with this name. Raises for a setting that is not allowed."""
    settings = value.get("configuration") if isinstance(value, dict) and value.get("name") == name else None
    if not isinstance(settings, dict) or len(value) != 2 or not {*settings} <= allowed:
        raise CheckpointError(f"{where} has a {name} that Orbax does not write")
    return settings


def _sizes(value: Any, within: tuple[int, ...] | None, where: str) -> tuple[int, ...]:
    """Return a shape. Raises if an axis is larger than that axis of `within`."""
    if (
        not isinstance(value, list)
        or len(value) > 16
        or not all(type(size) is int and 1 <= size < 2**31 for size in value)
        or math.prod(value) >= 2**48
        or (within is not None and (len(value) != len(within) or any(map(int.__gt__, value, within))))
    ):
        raise CheckpointError(f"{where} has a shape or a chunk shape that is out of range")
    return tuple(value)


def _is_compressed(codecs: Any, where: str) -> bool:
    """Whether chunks are compressed. Raises unless the codecs are one of the two lists that Orbax writes."""
    if not isinstance(codecs, list) or len(codecs) not in (1, 2) or codecs[0] not in (_BYTES, {"name": "bytes"}):
        raise CheckpointError(f"{where} has codecs that Orbax does not write: {quoted(json.dumps(codecs))}")
    if len(codecs) == 2:
        settings = _configuration(codecs[1], "zstd", {"level", "checksum"}, where)
        if type(settings.get("level", 0)) is not int or type(settings.get("checksum", False)) is not bool:
            raise CheckpointError(f"{where} has a zstd codec with invalid settings")
    return len(codecs) == 2


def _unreadable(where: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"cannot read {quoted(where)}: {quoted(problem)}; use another checkpoint of the run")

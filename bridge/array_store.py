"""The arrays of a checkpoint that orbax wrote, checked before tensorstore reads them.

Orbax stores zarr arrays in an OCDBT database: a manifest, and a tree of nodes that say which key lies where in which
file. tensorstore trusts all of it: a small node or chunk may decompress to gigabytes, an array may declare a size for
which the process aborts, nodes may refer to each other without end, and a key may lie in a file outside the directory.
`open_arrays` walks the tree with limits, and opens only what has the form that orbax writes.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bridge.errors import CheckpointError, quoted
from bridge.json_text import parse_object
from bridge.small_file import read_small_file
from bridge.zstd_frame import largest_content

_DTYPES = {
    **{name: np.dtype(name) for name in ("bool", "uint8", "int32", "uint32", "int64", "float16", "float32", "float64")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_MANIFEST, _MOST_MANIFEST_BYTES = "manifest.ocdbt", 2**20
_MOST_TREE_BYTES, _MOST_NODES, _MOST_KEYS, _MOST_KEY_BYTES = 2**24, 10_000, 200_000, 512
"""Of all nodes together, decompressed. A node holds for each array about a kilobyte of description."""
_MOST_DESCRIPTION_BYTES = 2**14
_HEADER = 14
"""Bytes of a node before its content: magic, length, version and kind of compression."""
_LOCATION = re.compile(r"(btreenode|value):([\w./-]*):([\w./-]+):(\d{1,19}):(\d{1,19})", re.ASCII)
_KEY = re.compile(r"([\w.-]+)/(zarr\.json|c(?:/\d{1,9}){0,16})", re.ASCII)
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_INDEX_CODECS = [_BYTES, {"name": "crc32c"}]
_SLACK = 2**20


@dataclass(frozen=True)
class _Piece:
    """A part of a file, or bytes that lie in the tree itself."""

    file: Path | None
    offset: int
    size: int
    inline: bytes = b""

    def read(self, start: int, count: int) -> bytes:
        """Bytes from `start` on, fewer where the piece ends."""
        count = max(0, min(count, self.size - start))
        if self.file is None:
            return self.inline[start : start + count]
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset + start)
            return file.read(count)

    def part(self, start: int, count: int) -> _Piece:
        return _Piece(self.file, self.offset + start, count, self.inline[start : start + count])


@dataclass(frozen=True)
class StoredArray:
    """One array of the database. tensorstore opens it when it is read."""

    state: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, index: Any = ...) -> np.ndarray:
        """The array, or a part of it; raises `CheckpointError` where it cannot be read."""
        import tensorstore

        # A missing chunk, as where training removes a checkpoint while it is read, is an error and not zeros.
        spec = {"driver": "zarr3", "fill_missing_data_reads": False}
        try:
            array = tensorstore.open({**spec, "kvstore": {**_database(self.state), "path": f"{self.name}/"}}).result()
            return np.asarray(array[index].read().result(), order="C")
        except (ValueError, OSError, IndexError) as error:
            raise _unreadable(self.state, str(error).partition("\n")[0]) from error


def open_arrays(state: Path) -> dict[str, StoredArray]:
    """Every array of a saved state by its name, `params.wte.embedding`; none is read.

    Raises `CheckpointError` for a database of another form than orbax writes.
    """
    try:
        arrays = dict(_arrays(state))
    except OSError as error:
        raise _unreadable(state, error.strerror or str(error)) from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        # CheckpointError is a ValueError and says more; the others come from a dump of another form.
        raise error if isinstance(error, CheckpointError) else _unreadable(state, str(error)) from error
    return arrays


def _database(state: Path) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{state}/"}}


def _arrays(state: Path) -> Iterator[tuple[str, StoredArray]]:
    grouped: dict[str, dict[str, _Piece]] = {}
    for key, piece in _entries(state):
        match = _KEY.fullmatch(key.decode("ascii", "replace"))
        if match is None or len(key) > _MOST_KEY_BYTES:
            raise _unreadable(state, f"the key {quoted(key)} is not one of an array")
        grouped.setdefault(match[1], {})[match[2]] = piece
    for name, pieces in sorted(grouped.items()):
        where = f"{quoted(state)}: {quoted(name)}"
        if "zarr.json" not in pieces:
            raise CheckpointError(f"{where} has no description; use another checkpoint of the run")
        description = pieces.pop("zarr.json")
        if description.size > _MOST_DESCRIPTION_BYTES:
            raise CheckpointError(f"{where} has a description of {description.size} bytes")
        fields = parse_object(description.read(0, description.size), where, CheckpointError)
        form = _Form.of(fields, where)
        for key, piece in pieces.items():
            form.require_chunk(key, piece, where)
        yield name, StoredArray(state, name, form.shape, form.dtype)


# The tree of keys.


def _entries(state: Path) -> Iterator[tuple[bytes, _Piece]]:
    """Every key of the database and where its value lies."""
    import tensorstore

    manifest = state / _MANIFEST
    content = read_small_file(manifest, _MOST_MANIFEST_BYTES, CheckpointError)
    _require_small(_Piece(None, 0, len(content), content), _MOST_MANIFEST_BYTES, manifest)
    base = tensorstore.KvStore.open({"driver": "file", "path": f"{state}/"}).result()
    versions = tensorstore.ocdbt.dump(base).result()["versions"]
    root = versions[-1]["root"] if versions else {}
    waiting = [root["location"]] if "location" in root else []
    seen, left, keys = set(waiting), _MOST_TREE_BYTES, 0
    while waiting:
        location = waiting.pop()
        left -= _require_small(_piece(state, location, "btreenode"), left, state)
        for entry in tensorstore.ocdbt.dump(base, location).result()["entries"]:
            if "key" in entry:
                keys += 1
                inline = entry.get("inline_value")
                yield (
                    entry["key"],
                    _piece(state, entry["indirect_value"], "value")
                    if inline is None
                    else _Piece(None, 0, len(inline), inline),
                )
            else:
                waiting.append(entry["location"])
        if len({*seen, *waiting}) < len(seen) + len(waiting) or len(seen) > _MOST_NODES or keys > _MOST_KEYS:
            raise _unreadable(state, "a node of its tree is reached twice, or there are too many")
        seen.update(waiting)


def _piece(state: Path, location: str, kind: str) -> _Piece:
    """The part of a file that a location names, which has to lie in the directory."""
    match = _LOCATION.fullmatch(location)
    name = match[2] + match[3] if match else ""
    if match is None or match[1] != kind or any(part in ("", ".", "..") for part in name.split("/")):
        raise _unreadable(state, f"{quoted(location)} is no place in it")
    path, offset, size = state / name, int(match[4]), int(match[5])
    for folder in itertools.takewhile(lambda folder: folder != state, path.parents):
        if folder.is_symlink():
            raise _unreadable(state, f"{quoted(folder)} is a link")
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode) or offset + size > status.st_size:
        raise _unreadable(state, f"{quoted(location)} does not lie in a file")
    return _Piece(path, offset, size)


def _require_small(node: _Piece, most: int, where: Path) -> int:
    """Raise unless a node decompresses to at most `most` bytes; gives how many it may decompress to."""
    header = node.read(0, _HEADER)
    size: int | None = node.size
    if len(header) < _HEADER or header[12] or header[13] > 1:  # version, kind of compression
        raise _unreadable(where, "a node of its tree is damaged")
    if header[13] == 1:  # zstd
        size = largest_content(node.part(_HEADER, node.size - _HEADER - 4).read, node.size - _HEADER - 4)
    if size is None or max(size, node.size) > most:
        raise _unreadable(where, "a node of its tree is damaged or too large")
    return size


# The description of an array.


@dataclass(frozen=True)
class _Form:
    """An array as its `zarr.json` describes it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    """Shape of what is stored under one key."""
    inner: tuple[int, ...]
    """Shape of what is encoded at once."""
    is_sharded: bool
    is_compressed: bool

    @classmethod
    def of(cls, fields: Mapping[str, Any], where: str) -> _Form:
        dtype = fields.get("data_type")
        shape = _sizes(fields.get("shape"), None, where)
        grid = fields.get("chunk_grid")
        chunk = _sizes(_configuration(grid, "regular", {"chunk_shape"}, where)["chunk_shape"], shape, where)
        codecs, inner = fields.get("codecs"), chunk
        is_sharded = isinstance(codecs, list) and len(codecs) == 1 and _name(codecs[0]) == "sharding_indexed"
        if is_sharded:
            shard = _configuration(
                codecs[0], "sharding_indexed", {"chunk_shape", "codecs", "index_codecs", "index_location"}, where
            )
            inner, codecs = _sizes(shard.get("chunk_shape"), chunk, where), shard.get("codecs")
            if shard.get("index_codecs") != _INDEX_CODECS or shard.get("index_location", "end") != "end":
                raise CheckpointError(f"{where} has an index of another form than orbax writes")
            if any(whole % part for whole, part in zip(chunk, inner, strict=True)):
                raise CheckpointError(f"{where} has chunks that do not divide their shards")
        others = {name: value for name, value in fields.items() if name not in ("chunk_grid", "codecs", "shape")}
        fill = others.pop("fill_value", 0)
        expected = {"chunk_key_encoding": {"name": "default"}, "data_type": dtype, "node_type": "array"}
        if {**others, "attributes": {}} != {**expected, "zarr_format": 3, "attributes": {}} or isinstance(
            fill, list | dict
        ):
            raise CheckpointError(f"{where} is described in another form than orbax writes")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise CheckpointError(f"{where} holds {quoted(dtype)}; {', '.join(_DTYPES)} are read")
        return cls(shape, _DTYPES[dtype], chunk, inner, is_sharded, _is_compressed(codecs, where))

    def require_chunk(self, key: str, piece: _Piece, where: str) -> None:
        """Raise unless a chunk lies in the array, and is not larger than its part of it when it is decompressed."""
        indices = [int(index) for index in key.split("/")[1:]]
        if len(indices) != len(self.shape) or any(
            index * step >= max(size, 1) for index, step, size in zip(indices, self.chunk, self.shape, strict=True)
        ):
            raise CheckpointError(f"{where} has a chunk {quoted(key)} outside its shape {self.shape}")
        count = math.prod(self.chunk) // math.prod(self.inner) if self.is_sharded else 1
        nbytes, index_bytes = math.prod(self.inner) * self.dtype.itemsize, (16 * count + 4) * self.is_sharded
        damaged = CheckpointError(f"{where}: its chunk {quoted(key)} is damaged; use another checkpoint of the run")
        if not index_bytes <= piece.size <= count * (2 * nbytes + 64) + index_bytes:
            raise damaged
        if not self.is_compressed:
            if piece.size != count * nbytes + index_bytes:
                raise damaged
            return
        spans = [(0, piece.size)]
        if self.is_sharded:
            index = np.frombuffer(piece.read(piece.size - index_bytes, index_bytes - 4), "<u8").reshape(-1, 2).tolist()
            spans = [(offset, size) for offset, size in index if (offset, size) != (2**64 - 1, 2**64 - 1)]
        for offset, size in spans:
            # A block of 128 KiB may be split in sixteen, of which each may be as large for all that its header says.
            if offset + size > piece.size:
                raise damaged
            largest = largest_content(piece.part(offset, size).read, size)
            if largest is None or largest > 16 * nbytes + _SLACK:
                raise damaged


def _name(codec: Any) -> Any:
    return codec.get("name") if isinstance(codec, dict) else None


def _configuration(value: Any, name: str, allowed: set[str], where: str) -> dict[str, Any]:
    """The settings of a part of the description that has this name, none but those allowed."""
    settings = value.get("configuration") if isinstance(value, dict) and value.get("name") == name else None
    if not isinstance(settings, dict) or len(value) != 2 or not {*settings} <= allowed:
        raise CheckpointError(f"{where} has another {name} than orbax writes")
    return settings


def _sizes(value: Any, within: tuple[int, ...] | None, where: str) -> tuple[int, ...]:
    """A shape, no axis of which is larger than that of `within`."""
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
    """Whether arrays are compressed: the two lists of codecs that orbax writes."""
    first = codecs[0] if isinstance(codecs, list) and codecs else None
    if first not in (_BYTES, {"name": "bytes"}) or len(codecs) > 2:
        raise CheckpointError(f"{where} has other codecs than orbax writes: {quoted(json.dumps(codecs))}")
    if len(codecs) == 2:
        settings = _configuration(codecs[1], "zstd", {"level", "checksum"}, where)
        if type(settings.get("level", 0)) is not int or type(settings.get("checksum", False)) is not bool:
            raise CheckpointError(f"{where} has a zstd codec with settings of other types")
    return len(codecs) == 2


def _unreadable(where: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"cannot read {quoted(where)}: {quoted(problem)}; use another checkpoint of the run")

"""Flax's msgpack files, trees of named arrays: read one array at a time, written as a stream.

The `msgpack` package is not used. Its unpacker decodes a whole file with all arrays in memory, and Flax then accepts
any dtype and shape. Its packer needs each array as bytes and copies them, which triples the memory of the largest
tensor. The tests compare both directions with `flax.serialization`.

Format: a map of maps. Leaves have extension type 1: a msgpack list of shape, dtype name and bytes. An array of more
than 2^30 bytes is stored as a map with its shape and flat chunks.
https://github.com/msgpack/msgpack/blob/master/spec.md and `flax.serialization.msgpack_serialize`
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeGuard

import numpy as np

from bridge.errors import CheckpointError, quoted
from bridge.storage.dtypes import DTYPES
from bridge.storage.regular_file import first_bytes
from bridge.storage.stored_file import StoredFile, write_array
from bridge.storage.tensors import MOST_RANK, LazyTensor, LazyTensorMap, aligned_empty, are_sizes
from bridge.storage.trees import flatten, insert

MOST_CHUNK_BYTES = 2**30
"""Larger arrays are stored in flat chunks of this size, `flax.serialization.MAX_CHUNK_SIZE`."""

_ARRAY, _COMPLEX, _SCALAR, _TIME = 1, 2, 3, -1  # extension types; the last is defined by msgpack
_CHUNKED = "__msgpack_chunked_array__"

# Limits on the cost of a malicious file, which may be sparse. A GPT-2 needs far less.
_MOST_VALUES = 2**15  # GPT-2 XL has 580 arrays, and fewer maps
_MOST_DEPTH = 16
_MOST_NAME_BYTES = 256
_BLOCK_BYTES = 4096

_MAP, _LIST, _TEXT, _BYTES, _EXTENSION = "a map", "a list", "a string", "bytes", "an extension"
_NUMBER, _BOOL = "a whole number", "a bool"

_HEADS: Mapping[int, tuple[str, int, int]] = {
    **{n: (_NUMBER, 0, n) for n in range(0x80)},
    **{0x80 + n: (_MAP, 0, n) for n in range(16)},
    **{0x90 + n: (_LIST, 0, n) for n in range(16)},
    **{0xA0 + n: (_TEXT, 0, n) for n in range(32)},
    0xC0: ("nil", 0, 0),
    0xC1: ("an invalid value", 0, 0),
    **{0xC2 + n: (_BOOL, 0, n) for n in range(2)},
    **{0xC4 + n: (_BYTES, 2**n, 0) for n in range(3)},
    **{0xC7 + n: (_EXTENSION, 2**n, 0) for n in range(3)},
    **{0xCA + n: ("a float", 4 * 2**n, 0) for n in range(2)},
    **{0xCC + n: (_NUMBER, 2**n, 0) for n in range(4)},
    **{0xD0 + n: (_NUMBER, 2**n, 0) for n in range(4)},  # signed
    **{0xD4 + n: (_EXTENSION, 0, 2**n) for n in range(5)},
    **{0xD9 + n: (_TEXT, 2**n, 0) for n in range(3)},
    **{0xDC + n: (_LIST, 2 * 2**n, 0) for n in range(2)},
    **{0xDE + n: (_MAP, 2 * 2**n, 0) for n in range(2)},
    **{0xE0 + n: (_NUMBER, 0, n - 32) for n in range(32)},
}
"""First byte of a value -> (kind, width, number). The following `width` bytes hold the value's length or number. If
`width` is 0, `number` is the length or number itself."""

_Node: TypeAlias = "dict[str, _Node] | LazyTensor | int"


def is_msgpack(path: Path) -> bool:
    """Whether a file starts with a small map that has a short name. Returns False for an unreadable file."""
    start = first_bytes(path, 2)
    return len(start) == 2 and 0x81 <= start[0] <= 0x8F and 0xA1 <= start[1] <= 0xBF


def read_file(path: str | Path) -> dict[str, LazyTensor]:
    """Return path in the tree (`transformer/wte/embedding`) -> lazy tensor.

    Raises `CheckpointError` for anything but a complete tree of arrays. Declared sizes are validated against the size
    of the file before memory is allocated.
    """
    scanner = _Scanner(StoredFile.open(path))
    tree = scanner.value()
    if not isinstance(tree, dict):
        raise scanner.refusal("this is not a tree of parameters")
    if trailing := scanner.file.size - scanner.position:
        raise scanner.refusal(f"{trailing} bytes after the end of the tree; the file is damaged")
    leaves: dict[str, LazyTensor] = flatten(tree)
    for name, leaf in leaves.items():
        if not isinstance(leaf, LazyTensor):
            raise scanner.refusal(f"{quoted(name)} is the number {leaf}, not an array")
    return leaves


def write_file(path: str | Path, tensors: LazyTensorMap) -> None:
    """Write `tensors` (path in the tree -> array) one at a time, in the layout of `flax.serialization.to_bytes`."""
    tree: dict[str, Any] = {}
    for name, entry in tensors.entries.items():
        if entry.dtype not in DTYPES.values():
            raise CheckpointError(f"{quoted(name)}: Flax's msgpack files cannot hold {entry.dtype}")
        insert(tree, name.split("/"), entry)
    if len(tensors) > _MOST_VALUES // 2:  # the other half is for maps
        raise CheckpointError(f"{len(tensors)} tensors exceed the limit for reading, {_MOST_VALUES // 2}")
    with open(path, "xb") as file:
        _write(file, "", tree)


class _Scanner:
    """A position in the file. Reads in blocks, because `StoredFile` opens the file for each read."""

    def __init__(self, file: StoredFile) -> None:
        self.file = file
        self.position = 0
        self.path: list[str] = []
        """Names on the path from the root to this position, for messages."""
        self._values = 0
        self._block = b""
        self._block_start = 0

    def refusal(self, why: str) -> CheckpointError:
        where = f"{quoted('/'.join(self.path))}: " if self.path else ""
        return CheckpointError(f"{quoted(self.file.path)}: {where}{why}")

    def skip(self, count: int) -> int:
        """Skip `count` bytes and return the position of the first. Raises if the file is too short."""
        start = self.position
        if count > self.file.size - start:
            raise self.refusal(
                f"{count} bytes from {start} exceed the file's {self.file.size}; it is damaged or truncated"
            )
        self.position += count
        return start

    def take(self, count: int) -> bytes:
        start = self.skip(count)
        if self.position > self._block_start + len(self._block):
            self._block = self.file.read(start, max(count, min(_BLOCK_BYTES, self.file.size - start)))
            self._block_start = start
        return self._block[start - self._block_start : self.position - self._block_start]

    def head(self) -> tuple[str, int]:
        """Read the first bytes of a value. Return its kind, and its length or, for a number, its value."""
        first = self.take(1)[0]
        kind, width, value = _HEADS[first]
        if width:
            value = int.from_bytes(self.take(width), "big", signed=0xD0 <= first <= 0xD3)
        return kind, value

    def expect(self, kind: str, what: str) -> int:
        """Read the start of a value of this `kind` and return its length or number. Messages call it `what`."""
        found, value = self.head()
        if found != kind:
            raise self.refusal(f"{what} is {found}, not {kind}")
        return value

    def text(self, what: str) -> str:
        length = self.expect(_TEXT, what)
        if length > _MOST_NAME_BYTES:
            raise self.refusal(f"{what} has {length} bytes; the limit is {_MOST_NAME_BYTES}")
        text = self.take(length)
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise self.refusal(f"{what} is not UTF-8: {quoted(text)}") from None

    def value(self) -> _Node:
        self._values += 1
        if self._values > _MOST_VALUES:
            raise self.refusal(f"the file has more than {_MOST_VALUES} values; it is not a GPT-2")
        kind, value = self.head()
        match kind:
            case "a map":
                return self.map(value)
            case "an extension":
                return self.extension(value)
            case "a whole number":  # numbers and bools are valid only in chunked arrays
                return value
            case "a bool":
                return bool(value)
        raise self.refusal(f"this is {kind}, not an array")

    def map(self, count: int) -> _Node:
        if len(self.path) >= _MOST_DEPTH:
            raise self.refusal(f"maps are nested more than {_MOST_DEPTH} deep")
        node: dict[str, _Node] = {}
        for _ in range(count):  # bounded: each entry needs bytes of the file
            name = self.text("a name in this map")
            if not name or "/" in name:
                raise self.refusal(f"{quoted(name)} is not a valid name of a module or a parameter")
            if name in node:
                raise self.refusal(f"{quoted(name)} appears twice")
            self.path.append(name)
            node[name] = self.value()
            self.path.pop()
        return self.joined(node) if _CHUNKED in node else node

    def extension(self, length: int) -> LazyTensor:
        type = int.from_bytes(self.take(1), "big", signed=True)
        if type not in (_ARRAY, _SCALAR):
            what = {_COMPLEX: "a complex number", _TIME: "a time"}.get(type, f"of extension type {type}")
            raise self.refusal(f"this is {what}, not an array")
        end = self.position + length
        entry = self.array()
        if self.position != end:
            raise self.refusal(f"the array ends at byte {self.position}, but its stated length ends at byte {end}")
        return entry

    def array(self) -> LazyTensor:
        parts = self.expect(_LIST, "an array's content")
        if parts != 3:
            raise self.refusal(f"an array of {parts} parts; Flax stores shape, dtype and bytes")
        rank = self.expect(_LIST, "its shape")
        if rank > MOST_RANK:
            raise self.refusal(f"a shape with {rank} axes; the limit is {MOST_RANK}")
        shape = tuple(self.expect(_NUMBER, "a size in its shape") for _ in range(rank))
        name = self.text("its dtype")
        nbytes = self.expect(_BYTES, "its data")
        start = self.skip(nbytes)
        if name not in DTYPES:
            raise self.refusal(f"its dtype is {quoted(name)}, not one of {', '.join(DTYPES)}")
        needed = math.prod(shape) * DTYPES[name].itemsize
        if min(shape, default=0) < 0 or needed != nbytes:
            raise self.refusal(f"shape {shape} of {name} needs {quoted(needed)} bytes, but the array has {nbytes}")
        return self.file.entry(DTYPES[name], shape, start)

    def joined(self, node: dict[str, _Node]) -> LazyTensor:
        """Return the array that a map stores as shape and chunks."""
        shape, chunks = _listed(node.get("shape")), _listed(node.get("chunks"))
        if node.keys() != {_CHUNKED, "shape", "chunks"} or node[_CHUNKED] is not True or not shape or not chunks:
            raise self.refusal("a chunked array must have only a shape and chunks, each with entries numbered from 0")
        if not are_sizes(shape, list) or not _are_chunks(chunks) or len({chunk.dtype for chunk in chunks}) > 1:
            raise self.refusal(
                f"a chunked array must have a shape of at most {MOST_RANK} whole numbers, and flat chunks of one dtype"
            )
        total = sum(chunk.shape[0] for chunk in chunks)
        if math.prod(shape) != total:
            raise self.refusal(f"shape {quoted(shape)} does not fit the {total} elements of the chunks")
        return _concatenated(chunks, tuple(shape))


def _listed(node: _Node | None) -> list[_Node]:
    """Return the values of a map whose names are 0, 1, 2, ...; an empty list for any other node."""
    if not isinstance(node, dict) or node.keys() != {str(i) for i in range(len(node))}:
        return []
    return [node[str(i)] for i in range(len(node))]


def _are_chunks(nodes: list[_Node]) -> TypeGuard[list[LazyTensor]]:
    return all(isinstance(node, LazyTensor) and len(node.shape) == 1 for node in nodes)


def _concatenated(chunks: list[LazyTensor], shape: tuple[int, ...]) -> LazyTensor:
    dtype = chunks[0].dtype

    def read() -> np.ndarray:
        array = aligned_empty(shape, dtype)
        flat, position = array.reshape(-1), 0
        for chunk in chunks:
            end = position + chunk.shape[0]
            flat[position:end] = chunk.read()
            position = end
        return array

    return LazyTensor(dtype, shape, read)


_SHORTEST = {(kind, value): first for first, (kind, width, value) in _HEADS.items() if not width}
_WIDER: dict[str, list[tuple[int, int]]] = {}
for _first, (_kind, _width, _value) in _HEADS.items():
    if _width:
        _WIDER.setdefault(_kind, []).append((_width, _first))


def _head(kind: str, value: int) -> bytes:
    """Encode kind and length in the fewest bytes, as msgpack's writers do. The inverse of `_Scanner.head`."""
    if (kind, value) in _SHORTEST:
        return bytes([_SHORTEST[kind, value]])
    width, first = next(wider for wider in _WIDER[kind] if value < 256 ** wider[0])
    return bytes([first]) + value.to_bytes(width, "big")


def _text(text: str) -> bytes:
    return _head(_TEXT, len(text.encode())) + text.encode()


def _write(file: BinaryIO, name: str, node: dict[str, Any] | LazyTensor | int) -> None:
    match node:
        case dict():
            file.write(_head(_MAP, len(node)))
            for child, value in node.items():
                file.write(_text(child))
                _write(file, f"{name}/{child}".lstrip("/"), value)
        case LazyTensor() if node.nbytes > MOST_CHUNK_BYTES:
            _write(file, name, _chunked(name, node))
        case LazyTensor():
            sizes = b"".join(_head(_NUMBER, size) for size in node.shape)
            start = _head(_LIST, 3) + _head(_LIST, len(node.shape)) + sizes + _text(node.dtype.name)
            start += _head(_BYTES, node.nbytes)
            file.write(_head(_EXTENSION, len(start) + node.nbytes) + bytes([_ARRAY]) + start)
            write_array(file, name, node)
        case _:
            file.write(_head(_BOOL if node is True else _NUMBER, node))


def _chunked(name: str, entry: LazyTensor) -> dict[str, Any]:
    """Read a large array and split it into chunks as Flax does."""
    array = entry.read()
    if array.dtype != entry.dtype or array.shape != entry.shape:
        raise CheckpointError(f"{quoted(name)} changed while it was being written")
    flat = np.ascontiguousarray(array).reshape(-1)
    count = max(1, MOST_CHUNK_BYTES // entry.dtype.itemsize)
    chunks = [LazyTensor.of(flat[start : start + count]) for start in range(0, len(flat), count)]
    return {_CHUNKED: True, "shape": _numbered(entry.shape), "chunks": _numbered(chunks)}


def _numbered(values: tuple[Any, ...] | list[Any]) -> dict[str, Any]:
    return {str(i): value for i, value in enumerate(values)}

"""OpenAI's directories, written by TensorFlow and read by a simple reader that checks nothing.

Checksums detect nearly all damage, so most mutants get valid checksums in their index.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bridge.containers.tensor_bundle import masked_crc32c

FILES = Path(__file__).parent.parent / "files" / "tensorflow-2.21.0"
DTYPES = {1: np.float32, 2: np.float64, 19: np.float16}
KINDS = {"w": "weight", "b": "bias", "g": "weight"}


def samples(folder: Path) -> list[Path]:
    for name in ("plain", "adam", "sharded"):
        shutil.copytree(FILES / name, folder / name, ignore=shutil.ignore_patterns("*.npz"))
    return [folder / name for name in ("plain", "adam", "sharded")]


def mutable(source: Path) -> list[Path]:
    return sorted(source.iterdir())


def oracle(source: Path) -> dict[str, np.ndarray]:
    index = (source / "model.ckpt.index").read_bytes()
    shards = sorted(source.glob("model.ckpt.data-*"))
    found = {}
    for key, value in entries(index):
        fields = dict(message(value))
        name = key.decode()
        if not name.startswith("model/") or "/Adam" in name:
            continue
        shape = [dict(message(dim)).get(1, 0) for _, dim in message(fields.get(2, b""))]
        content = shards[fields.get(3, 0)].read_bytes()
        start = fields.get(4, 0)
        array = np.frombuffer(content[start : start + fields[5]], DTYPES[fields[1]]).reshape(shape)
        *modules, kind = name.removeprefix("model/").split("/")
        canonical = ".".join([*modules, KINDS[kind]]) if kind in KINDS else f"{kind}.weight"
        if canonical[0] == "h":
            canonical = f"h.{canonical[1:]}"
        found[canonical] = array[0] if kind == "w" else array
    return found


def entries(index: bytes) -> Iterator[tuple[bytes, bytes]]:
    for _, handle in block(index, *index_handle(index)):
        offset, at = varint(handle, 0)
        yield from list(block(index, offset, varint(handle, at)[0]))


def index_handle(index: bytes) -> tuple[int, int]:
    """Return the offset and size of the index block, from the last 48 bytes."""
    numbers, at = [], len(index) - 48
    for _ in range(4):
        number, at = varint(index, at)
        numbers.append(number)
    return numbers[2], numbers[3]


def block(index: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    content = index[offset : offset + size]
    end = size - 4 - 4 * int.from_bytes(content[-4:], "little")
    at, key = 0, b""
    while at < end:
        shared, at = varint(content, at)
        added, at = varint(content, at)
        length, at = varint(content, at)
        key, at = key[:shared] + content[at : at + added], at + added
        yield key, content[at : at + length]
        at += length


def message(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(content):
        tag, at = varint(content, at)
        if tag & 7 == 0:
            value, at = varint(content, at)
        elif tag & 7 == 5:
            value, at = int.from_bytes(content[at : at + 4], "little"), at + 4
        else:
            length, at = varint(content, at)
            value, at = content[at : at + length], at + length
        yield tag >> 3, value


def varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (content[at] & 0x7F) << shift
        shift += 7
        at += 1
        if content[at - 1] < 0x80:
            return value, at


def repair(source: Path) -> None:
    """Update the checksums of all blocks that can be found."""
    file = source / "model.ckpt.index"
    content = bytearray(file.read_bytes())
    try:
        offset, size = index_handle(content)
        handles = [(offset, size)]
        for _, handle in block(content, offset, size):
            start, at = varint(handle, 0)
            handles.append((start, varint(handle, at)[0]))
        for start, length in handles:
            end = start + length + 1
            if end + 4 <= len(content):
                content[end : end + 4] = masked_crc32c(bytes(content[start:end])).to_bytes(4, "little")
    except IndexError:
        return
    file.write_bytes(content)

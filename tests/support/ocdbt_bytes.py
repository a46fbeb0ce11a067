"""OCDBT databases built byte by byte, as an attacker who knows the format may write them.

Source: TensorStore's documentation, "OCDBT storage format".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import google_crc32c

MANIFEST, NODE = 0x0CDB3A2A, 0x0CDB20DE
DATA_FILE = "d/data"
ZSTD = b"\x28\xb5\x2f\xfd"

Location = tuple[int, int, int]
"""Index of the data file, offset, and length."""


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def varints(values: Sequence[int]) -> bytes:
    return b"".join(map(varint, values))


def framed(magic: int, content: bytes, compression: int = 0) -> bytes:
    """Return a node or a manifest with its header and checksum."""
    size = 4 + 8 + 2 + len(content) + 4
    whole = struct.pack(">I", magic) + struct.pack("<Q", size) + bytes([0, compression]) + content
    return whole + struct.pack("<I", google_crc32c.value(whole))


def file_table(files: Sequence[str]) -> bytes:
    names = [name.encode() for name in files]
    lengths = [len(name) for name in names]
    return varints([len(names), *[0] * (len(names) - 1), *lengths, *[0] * len(names)]) + b"".join(names)


def manifest(
    root: Location, height: int = 0, files: Sequence[str] = (DATA_FILE,), versions: int = 1, kind: int = 0
) -> bytes:
    config = bytes(16) + varints([kind, 1024, 100_000_000]) + bytes([4]) + varint(1) + bytes(4)
    version = (
        varints([versions, *range(1, versions + 1)])
        + bytes([height]) * versions
        + b"".join(varints([value] * versions) for value in (*root, 1, 1, 1))
        + bytes(8 * versions)
    )
    return framed(MANIFEST, config + file_table(files) + version + varint(0))


def leaf(values: dict[str, bytes | Location], files: Sequence[str] = (DATA_FILE,)) -> bytes:
    """Return a leaf node. Values are stored inline, or as a location."""
    keys = sorted(values)
    ordered = [values[key] for key in keys]
    places = [value for value in ordered if isinstance(value, tuple)]
    content = (
        bytes([0])
        + file_table(files)
        + keys_of(keys)
        + varints([value[2] if isinstance(value, tuple) else len(value) for value in ordered])
        + bytes(isinstance(value, tuple) for value in ordered)
        + varints([place[0] for place in places])
        + varints([place[1] for place in places])
        + b"".join(value for value in ordered if isinstance(value, bytes))
    )
    return framed(NODE, content)


def interior(height: int, children: dict[str, Location], files: Sequence[str] = (DATA_FILE,)) -> bytes:
    """Return a node of child nodes, by the first key below each."""
    keys = sorted(children)
    places = [children[key] for key in keys]
    columns = ([place[column] for place in places] for column in range(3))
    content = (
        bytes([height])
        + file_table(files)
        + keys_of(keys, with_subtrees=True)
        + b"".join(varints(column) for column in columns)
        + varints([1] * len(keys) * 3)
    )
    return framed(NODE, content)


def keys_of(keys: Sequence[str], with_subtrees: bool = False) -> bytes:
    names = [key.encode() for key in keys]
    counts = varints([len(names), *[0] * (len(names) - 1), *map(len, names)])
    return counts + (varints([0] * len(names)) if with_subtrees else b"") + b"".join(names)


def write(state: Path, nodes: Sequence[bytes], height: int = 0, files: Sequence[str] = (DATA_FILE,)) -> Path:
    """Write a database. Its last node is the root, and `files[0]` has all nodes in order."""
    (state / files[0]).parent.mkdir(parents=True, exist_ok=True)
    (state / files[0]).write_bytes(b"".join(nodes))
    root = (0, sum(map(len, nodes[:-1])), len(nodes[-1]))
    (state / "manifest.ocdbt").write_bytes(manifest(root, height, files))
    return state


def zstd_zeros(count: int, declared: int | None = None) -> bytes:
    """Return a frame of at least `count` zeros, run-length encoded in blocks of 128 KiB that take four bytes each."""
    blocks = -(-count // 2**17)
    header = ZSTD + (b"\xe0" + struct.pack("<Q", declared) if declared is not None else b"\x00\x38")
    return header + b"".join(
        struct.pack("<I", 2**17 << 3 | 1 << 1 | (i == blocks - 1))[:3] + b"\0" for i in range(blocks)
    )

"""Archives in the layout of torch.save, with any pickle and any records."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path


def archive(pickle: bytes, records: dict[str, bytes] | None = None, root: str = "archive") -> bytes:
    """Return an uncompressed zip with `data.pkl` and `records`. The standard library computes the checksums."""
    members = {"data.pkl": pickle, "version": b"3\n", "byteorder": b"little", **(records or {})}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
        for name, content in members.items():
            file.writestr(f"{root}/{name}", content)
    return out.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# Opcodes, protocol 2


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def tensor(
    key: str = "0", count: int = 4, offset: int = 0, shape: tuple[int, ...] = (4,), strides: tuple[int, ...] = (1,)
) -> bytes:
    """Return the pickle of a float32 tensor in the record `data/KEY`, as torch writes it."""
    storage = b"(" + text("storage") + name("torch", "FloatStorage") + text(key) + text("cpu") + integer(count) + b"tQ"
    sizes = [b"(" + b"".join(map(integer, values)) + b"t" for values in (shape, strides)]
    hooks = name("collections", "OrderedDict") + b")R"
    arguments = b"(" + storage + integer(offset) + sizes[0] + sizes[1] + b"\x89" + hooks + b"t"
    return name("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def pickled(value: bytes) -> bytes:
    """Return the pickle of a dictionary with `value` under the name `w`."""
    return b"\x80\x02}" + text("w") + value + b"s."

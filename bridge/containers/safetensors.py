"""The safetensors container: read one tensor at a time, written as a stream.

The `safetensors` package is not used to read or write tensors, for three reasons. It maps the file into memory, so a
file that shrinks while it is read ends the process with SIGBUS. It writes all tensors at once, while a conversion here
holds at most two of the largest tensors. Its numpy writer stores wrong data for arrays that are not C-contiguous
(upstream issue 825). Every written file is opened with the package before it is published, to prove that it is
readable. The tests compare both directions with the package.

Format: 8 bytes little-endian header length, the header as JSON, then the data without holes.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bridge.errors import CheckpointError, quoted
from bridge.storage.dtypes import SAFETENSORS_DTYPES
from bridge.storage.json_text import parse_object
from bridge.storage.regular_file import first_bytes
from bridge.storage.stored_file import StoredFile, write_array
from bridge.storage.tensors import MOST_RANK, LazyTensorMap, are_sizes

_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

_FORMATS_MOST_HEADER_BYTES = 10**8
# The header of GPT-2 XL has 60 kB. A malicious header takes 33 times its size when parsed, and refusing a file may cost
# at most 64 MiB.
_MOST_HEADER_BYTES = 2**20


def is_safetensors(path: Path) -> bool:
    """Whether a file starts with a header length and an opening brace. Returns False for an unreadable file."""
    start = first_bytes(path, 9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _FORMATS_MOST_HEADER_BYTES


def header_names(path: Path, tensor: str) -> bool:
    """Whether a safetensors file has a tensor of this name. Returns False for an unreadable file."""
    if not is_safetensors(path):
        return False
    start = first_bytes(path, 8 + _MOST_HEADER_BYTES)
    return json.dumps(tensor).encode() in start[8 : 8 + int.from_bytes(start[:8], "little")]


def read_file(path: str | Path) -> tuple[LazyTensorMap, dict[str, str]]:
    """Return the tensors of a safetensors file, each read on access, and its metadata.

    Raises `CheckpointError` unless the file is complete and well-formed. Declared sizes are validated against the size
    of the file before memory is allocated.
    """
    file = StoredFile.open(path)
    header, data_start = _read_header(file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{quoted(file.path)}: __metadata__ must map names to strings")
    entries = {}
    spans = []
    for name, described in header.items():
        dtype, shape, begin, end = _described(file.path, name, described, file.size - data_start)
        spans.append((begin, end, name))
        entries[name] = file.entry(dtype, shape, data_start + begin)
    _require_no_holes(file.path, spans, file.size - data_start)
    return LazyTensorMap(entries), metadata


def write_file(path: str | Path, tensors: LazyTensorMap, metadata: Mapping[str, str]) -> None:
    """Write `tensors` one at a time. At most one of them is in memory."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, entry in tensors.entries.items():
        if entry.dtype not in _NAMES:
            raise CheckpointError(f"{quoted(name)}: safetensors cannot hold {entry.dtype}")
        offsets = [position, position + entry.nbytes]
        header[name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        position = offsets[1]
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
    if len(encoded) > _MOST_HEADER_BYTES:
        raise CheckpointError(
            f"{len(tensors)} tensors need a header of {len(encoded)} bytes, which exceeds the limit for reading"
        )
    with open(path, "xb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name, entry in tensors.entries.items():
            write_array(file, name, entry)
    _require_readable(Path(path))


def _require_readable(path: Path) -> None:
    """Open a written file with the `safetensors` package, which validates the header and the file's size."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise CheckpointError(
            f"{quoted(path)}: the safetensors package cannot read the written file: {error}"
        ) from error


def _read_header(file: StoredFile) -> tuple[dict[str, Any], int]:
    """Return the header and the position of the data."""
    start = file.read(0, min(8, file.size))
    length = int.from_bytes(start, "little")
    if len(start) < 8:
        raise CheckpointError(f"{quoted(file.path)}: only {file.size} bytes; the file is empty or truncated")
    if length > file.size - 8:
        raise CheckpointError(
            f"{quoted(file.path)}: not a safetensors file, or truncated: its header would be longer than the file"
        )
    if length > _MOST_HEADER_BYTES:
        raise CheckpointError(f"{quoted(file.path)}: a header of {length} bytes; the limit is {_MOST_HEADER_BYTES}")
    return parse_object(file.read(8, length), f"{quoted(file.path)}: the header", CheckpointError), 8 + length


def _described(path: Path, name: str, described: Any, data_size: int) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Return dtype, shape, begin and end of one tensor, after validating them."""

    def refuse(why: str) -> CheckpointError:
        return CheckpointError(f"{quoted(path)}: tensor {quoted(name)}: {why}")

    if not isinstance(described, dict) or set(described) != {"dtype", "shape", "data_offsets"}:
        raise refuse("must have exactly dtype, shape and data_offsets")
    if not isinstance(described["dtype"], str) or described["dtype"] not in SAFETENSORS_DTYPES:
        raise refuse(f"dtype {quoted(described['dtype'])} is not one of {', '.join(SAFETENSORS_DTYPES)}")
    dtype = SAFETENSORS_DTYPES[described["dtype"]]
    shape, offsets = described["shape"], described["data_offsets"]
    if not are_sizes(shape, list):
        raise refuse(f"shape {quoted(shape)} is not a list of at most {MOST_RANK} sizes")
    if not are_sizes(offsets, list) or len(offsets) != 2 or not offsets[0] <= offsets[1]:
        raise refuse(f"data_offsets {quoted(offsets)} are not two positions in ascending order")
    if offsets[1] > data_size:
        raise refuse(
            f"ends at byte {quoted(offsets[1])} of the data, but the file has {data_size}: it is truncated; download "
            "or copy it again"
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != offsets[1] - offsets[0]:
        raise refuse(
            f"shape {shape} of {dtype} needs {quoted(nbytes)} bytes, but data_offsets give {offsets[1] - offsets[0]}"
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def _require_no_holes(path: Path, spans: list[tuple[int, int, str]], data_size: int) -> None:
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise CheckpointError(f"{quoted(path)}: tensor {quoted(name)} {what}")
        position = end
    if position != data_size:
        raise CheckpointError(
            f"{quoted(path)}: {data_size - position} bytes after the last tensor; the file is damaged"
        )

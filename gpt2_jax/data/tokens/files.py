"""Files of token ids: nanoGPT's `.bin`, llm.c's shards, and NumPy's `.npy`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path

import numpy as np

from bridge.errors import quoted
from bridge.storage.regular_file import open_regular_file
from gpt2_jax.data.errors import DataError

SIDECAR = "tokens.json"
"""The file that identifies a directory of the token cache."""

# llm.c, dev/data/data_common.py: the header has 256 int32. The first three are the magic number, the version and the
# number of tokens.
_LLMC_HEADER = 256 * 4
_LLMC: dict[int, tuple[int, np.dtype]] = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
_LLMC_EXAMPLES = 20240522  # HellaSwag and MMLU: questions, not text
_NPY = b"\x93NUMPY"
_NPY_DTYPES = ("<u2", "<i4", "<u4", "<i8")
_NPY_LENGTH_BYTES = {b"\1\0": 2, b"\2\0": 4, b"\3\0": 4}
_MAX_NPY_HEADER = 4096
"""Limit on the bytes of a .npy header. numpy writes 118 for a one-dimensional array."""
_NPY_AXIS = r"(?:0|[1-9]\d{0,18})L?"  # Python 2 wrote long integers as 12L
# The dictionary that numpy writes. With one axis, fortran_order does not matter.
_NPY_HEADER = re.compile(
    r"\{'descr': '(?P<dtype>[^'\\]{1,16})', 'fortran_order': (?:True|False), "
    rf"'shape': (?P<shape>\(\)|\({_NPY_AXIS},\)|\({_NPY_AXIS}(?:, {_NPY_AXIS})+\)),? ?\}} *\n?"
)


@dataclass(frozen=True)
class TokenFile:
    """The location of the token ids in a file: `count` ids of `dtype`, starting at byte `offset`."""

    path: Path
    dtype: np.dtype
    offset: int
    count: int

    @cached_property
    def id_range(self) -> tuple[int, int]:
        """The smallest and the largest id that the dtype can represent."""
        limits = np.iinfo(self.dtype)
        return int(limits.min), int(limits.max)

    def fetch(self, spans: Iterable[tuple[int, int]]) -> None:
        """Ask the system to prefetch these (start, stop) spans from the disk in parallel, without waiting."""
        if hasattr(os, "posix_fadvise"):  # on Linux
            with self._open() as file:
                for start, stop in spans:
                    position, size = self.offset + start * self.dtype.itemsize, (stop - start) * self.dtype.itemsize
                    os.posix_fadvise(file.fileno(), position, size, os.POSIX_FADV_WILLNEED)

    def read(self, spans: Iterable[tuple[int, int]]) -> list[np.ndarray]:
        """Return ids start ... stop - 1 of each (start, stop), in the dtype of the file."""
        arrays = []
        with self._open() as file:
            for start, stop in spans:
                ids = np.empty(stop - start, self.dtype)
                file.seek(self.offset + start * self.dtype.itemsize)
                rest = ids.view(np.uint8)
                while rest.size:  # Linux reads at most 2 GiB at a time
                    if not (done := file.readinto(rest.data)):
                        raise DataError(f"{quoted(self.path)} was truncated after it was opened; copy it again")
                    rest = rest[done:]
                arrays.append(ids)
        return arrays

    @contextmanager
    def _open(self) -> Iterator[FileIO]:
        try:
            with self.path.open("rb", buffering=0) as file:
                yield file
        except OSError as error:
            raise DataError(f"cannot read {quoted(self.path)}: {error.strerror}") from error


def is_token_file(path: Path) -> bool:
    """Whether a file holds tokens, by its first bytes or by the suffix `.bin`: nanoGPT's files have no header."""
    return path.suffix == ".bin" or has_magic(path)


def has_magic(path: Path) -> bool:
    """Whether the first bytes are those of `.npy` or of an llm.c file."""
    beginning = _beginning(path)
    return beginning.startswith(_NPY) or _number(beginning) in (*_LLMC, _LLMC_EXAMPLES)


def token_file(path: Path) -> TokenFile:
    """Open a token file of any kind. Raises `DataError` if it is truncated or not a token file."""
    try:
        size = path.stat().st_size
        file = _npy(path, size) if _beginning(path).startswith(_NPY) else _llmc(path, size) or _nanogpt(path, size)
    except OSError as error:
        raise DataError(f"cannot read {quoted(path)}: {error.strerror}") from error
    if file.count == 0:
        raise DataError(f"{quoted(path)} has no tokens; its write may not have completed")
    return file


def _llmc(path: Path, size: int) -> TokenFile | None:
    magic, version, count = (_number(_beginning(path)[at : at + 4]) for at in (0, 4, 8))
    if magic == _LLMC_EXAMPLES:
        raise DataError(f"{quoted(path)} holds multiple-choice questions of llm.c, not text; give its token shards")
    if magic not in _LLMC:
        return None
    if size < _LLMC_HEADER:
        raise DataError(f"{quoted(path)} ends inside its header of {_LLMC_HEADER} bytes; copy or write it again")
    expected, dtype = _LLMC[magic]
    if version != expected:
        raise DataError(
            f"{quoted(path)} is version {version} of llm.c's shards, but only {expected} is supported; write it again"
        )
    if size != _LLMC_HEADER + count * dtype.itemsize:
        raise DataError(
            f"{quoted(path)} should hold {count} tokens in {_LLMC_HEADER + count * dtype.itemsize} bytes and has "
            f"{size}; copy or write it again"
        )
    return TokenFile(path, dtype, _LLMC_HEADER, count)


def _nanogpt(path: Path, size: int) -> TokenFile:
    if path.suffix != ".bin":
        raise DataError(f"{quoted(path)} is not a token file (llm.c's shards, .npy, or nanoGPT's .bin)")
    if size % 2:
        raise DataError(
            f"{quoted(path)} has {size} bytes, an odd number, so it does not hold nanoGPT's uint16 tokens; it is "
            "truncated, or another kind of file"
        )
    return TokenFile(path, np.dtype("<u2"), 0, size // 2)


def _npy(path: Path, size: int) -> TokenFile:
    """Open a `.npy` file. Its header is matched against a pattern, because numpy's parser evaluates it as Python."""
    header, offset = _npy_header(path)
    match = _NPY_HEADER.fullmatch(header)
    if match is None:
        raise _npy_error(path, "its header does not describe a plain array")
    dtype, shape_text = match.group("dtype", "shape")
    shape = [int(axis) for axis in re.findall(r"\d+", shape_text)]
    if len(shape) != 1 or dtype not in _NPY_DTYPES:
        raise DataError(
            f"{quoted(path)} holds {quoted(dtype)} of shape {quoted(match['shape'])}; token ids are one-dimensional "
            "uint16, int32, uint32 or int64"
        )
    file = TokenFile(path, np.dtype(dtype), offset, shape[0])
    expected = offset + file.count * file.dtype.itemsize
    if size != expected:
        raise _npy_error(path, f"it has {size} bytes and its header describes {expected}")
    return file


def _npy_header(path: Path) -> tuple[str, int]:
    """Return the header and the offset of the data. Source: `numpy.lib.format`, versions 1.0 to 3.0."""
    with path.open("rb") as file:
        version = file.read(8)[6:]
        if version not in _NPY_LENGTH_BYTES:
            raise _npy_error(path, f"its version is {quoted(version.hex())}")
        length_bytes = file.read(_NPY_LENGTH_BYTES[version])
        length = int.from_bytes(length_bytes, "little")
        if length > _MAX_NPY_HEADER:
            raise _npy_error(path, f"its header would have {length} bytes")
        header = file.read(length)
    if len(header) < length or not header.isascii():
        raise _npy_error(path, "its header is truncated or not ASCII")
    return header.decode("ascii"), 8 + len(length_bytes) + length


def _npy_error(path: Path, reason: str) -> DataError:
    return DataError(f"{quoted(path)} cannot be read as .npy: {reason}; copy or write it again")


def _number(beginning: bytes) -> int:
    return int.from_bytes(beginning[:4], "little")


def _beginning(path: Path) -> bytes:
    try:
        with open_regular_file(path, DataError) as file:
            return file.read(12)
    except OSError as error:
        raise DataError(f"cannot read {quoted(path)}: {error.strerror}") from error

"""A file from which tensors are read one at a time, and writing a single tensor.

Files are read, not memory-mapped: a mapped file that shrinks kills the process, and mapped pages count as memory of the
process long after their content was copied.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bridge.errors import CheckpointError, quoted
from bridge.storage.regular_file import identity, open_regular_file
from bridge.storage.tensors import LazyTensor, aligned_empty, contiguous


@dataclass(frozen=True)
class StoredFile:
    """A regular file. Reading raises an error if the file has changed since it was opened.

    Every method raises a `CheckpointError` that names the file if the requested bytes do not exist.
    """

    path: Path
    size: int
    """Bytes."""
    _identity: tuple[int, ...]

    @classmethod
    def open(cls, path: str | Path) -> StoredFile:
        """Open a file. Raises an error if it is the result of a failed download, such as an HTML page."""
        path = Path(path).absolute()  # read later, perhaps from another working directory
        try:
            with open_regular_file(path, CheckpointError) as opened:
                status = os.fstat(opened.fileno())
        except CheckpointError:
            raise
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        file = cls(path, status.st_size, identity(status))
        if problem := _failed_download(file.read(0, min(64, file.size))):
            raise CheckpointError(f"{quoted(path)}: {problem}")
        return file

    def read(self, offset: int, count: int) -> bytes:
        """Return `count` bytes from `offset`."""
        self._require_inside(offset, count)
        content = bytearray(count)
        self._fill(memoryview(content), offset)
        return bytes(content)

    def entry(self, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> LazyTensor:
        """Return the tensor that is stored at `offset` in row-major order. It is read on each access."""
        self._require_inside(offset, math.prod(shape) * dtype.itemsize)

        def read_from(shape: tuple[int, ...], offset: int) -> np.ndarray:
            array = aligned_empty(shape, dtype)
            self._fill(array.reshape(-1).view(np.uint8).data, offset)
            return array

        def read_rows(start: int, stop: int) -> np.ndarray:
            row_bytes = math.prod(shape[1:]) * dtype.itemsize
            return read_from((stop - start, *shape[1:]), offset + start * row_bytes)

        return LazyTensor(dtype, shape, lambda: read_from(shape, offset), read_rows if shape else None)

    def _fill(self, view: memoryview, offset: int) -> None:
        try:
            with open_regular_file(self.path, CheckpointError) as file:
                if identity(os.fstat(file.fileno())) != self._identity:
                    raise CheckpointError(f"{quoted(self.path)} changed since it was opened; load it again")
                file.seek(offset)
                while view:
                    count = file.readinto(view)
                    if not count:
                        raise CheckpointError(f"{quoted(self.path)} was truncated while it was read")
                    view = view[count:]
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def _require_inside(self, offset: int, count: int) -> None:
        if not (0 <= offset <= self.size and 0 <= count <= self.size - offset):
            raise CheckpointError(
                f"{quoted(self.path)} is damaged or truncated: it has {self.size} bytes, and {quoted(count)} bytes at "
                f"offset {quoted(offset)} are needed"
            )


def _failed_download(start: bytes) -> str | None:
    """Return a description of the file if its first bytes show that a download failed, or None."""
    if start.startswith(b"version https://git-lfs"):
        return "this is a git-LFS pointer, not the weights; run `git lfs pull` in the repository that it came from"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "this is an HTML page, not weights; the download failed"
    return None


def write_array(file: BinaryIO, name: str, entry: LazyTensor) -> None:
    """Write the bytes of one tensor in row-major order.

    Raises a `CheckpointError` that contains `name` if the array does not have the dtype and shape of `entry`.
    """
    array = entry.read()
    if array.dtype != entry.dtype or array.shape != entry.shape:
        raise CheckpointError(f"{quoted(name)} changed while it was being written")
    file.write(contiguous(array).reshape(-1).view(np.uint8).data)


def _unreadable(path: Path, error: OSError | ValueError) -> CheckpointError:
    return CheckpointError(f"cannot read {quoted(path)}: {getattr(error, 'strerror', None) or error}")

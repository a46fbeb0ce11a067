"""A file that tensors are read from one at a time, and the writing of one tensor.

Plain reads, not a memory map: a file that shrinks under a map kills the process, and mapped pages count as this
process's memory long after they were copied out.
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
    """A regular file as it was when it was opened; once it has changed it is not read any more.

    Every method raises `CheckpointError`, with the file's name, where the bytes asked for are not there.
    """

    path: Path
    size: int
    """Bytes."""
    _identity: tuple[int, ...]

    @classmethod
    def open(cls, path: str | Path) -> StoredFile:
        """Also refuses what stands in a checkpoint's place after a failed download, and says what that is."""
        path = Path(path).absolute()  # it is read later, perhaps from another working directory
        try:
            with open_regular_file(path, CheckpointError) as opened:
                status = os.fstat(opened.fileno())
        except CheckpointError:
            raise
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        file = cls(path, status.st_size, identity(status))
        if stand_in := what_stands_in(file.read(0, min(64, file.size))):
            raise CheckpointError(f"{quoted(path)}: {stand_in}")
        return file

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on, which have to lie in the file."""
        self._require_inside(offset, count)
        content = bytearray(count)
        self._fill(memoryview(content), offset)
        return bytes(content)

    def entry(self, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> LazyTensor:
        """A tensor that lies in the file from `offset` on, row by row; it is read at each look-up."""
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
                        raise CheckpointError(f"{quoted(self.path)} became shorter while it was read")
                    view = view[count:]
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def _require_inside(self, offset: int, count: int) -> None:
        if not (0 <= offset <= self.size and 0 <= count <= self.size - offset):
            raise CheckpointError(
                f"{quoted(self.path)} is damaged or truncated: {quoted(count)} bytes from {quoted(offset)} on do not "
                f"lie in its {self.size}"
            )


def what_stands_in(start: bytes) -> str | None:
    """What a file that begins like this is, where it stands in for one that was not fetched."""
    if start.startswith(b"version https://git-lfs"):
        return "this is a git-LFS pointer, not the weights; run `git lfs pull` where it came from"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "this is an HTML page, not weights; the download went wrong"
    return None


def write_array(file: BinaryIO, name: str, entry: LazyTensor) -> None:
    """The bytes of one tensor, row by row; `name` is for the error where it is not what `entry` says."""
    array = entry.read()
    if array.dtype != entry.dtype or array.shape != entry.shape:
        raise CheckpointError(f"{quoted(name)} changed while it was being written")
    file.write(contiguous(array).reshape(-1).view(np.uint8).data)


def _unreadable(path: Path, error: OSError | ValueError) -> CheckpointError:
    return CheckpointError(f"cannot read {quoted(path)}: {getattr(error, 'strerror', None) or error}")

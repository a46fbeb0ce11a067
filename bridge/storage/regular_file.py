"""Open files only if they are regular files: opening a pipe blocks, and opening a device can have effects."""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

from bridge.errors import BridgeError, CheckpointError, quoted

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
"""Opening a pipe with O_NONBLOCK returns at once. Windows has neither O_NONBLOCK nor O_NOFOLLOW and needs O_BINARY."""


def open_regular_file(
    path: Path, error: type[BridgeError], *, follow_links: bool = True, named: Path | None = None
) -> BufferedReader:
    """Open a regular file for reading bytes.

    Args:
        path: the file.
        error: raised for a directory, a pipe or a device, and for a symbolic link unless `follow_links`.
        follow_links: whether `path` may be a symbolic link to a regular file.
        named: the path in messages, by default `path`.

    Raises:
        OSError: the file is missing or cannot be read.
    """

    def require_regular(status: os.stat_result) -> None:
        if stat.S_ISLNK(status.st_mode):
            raise error(f"{quoted(named or path)} is a symbolic link; a regular file is needed here")
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{quoted(named or path)} is not a regular file")

    require_regular(os.stat(path, follow_symlinks=follow_links))
    descriptor = os.open(path, _FLAGS if follow_links else _FLAGS | _NO_LINK)
    try:
        require_regular(os.fstat(descriptor))  # the path may name another file by now
    except BridgeError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_small_file(path: Path, most_bytes: int, error: type[BridgeError], named: Path | None = None) -> bytes:
    """Return the content of a regular file. `named` is its path in messages, by default `path`.

    Raises `error` for a symbolic link, a directory, a pipe or a device, and for a file of more than `most_bytes` bytes.
    Raises `OSError` if the file is missing or cannot be read.
    """
    with open_regular_file(path, error, follow_links=False, named=named) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(most_bytes + 1) if size <= most_bytes else b""
    if max(len(content), size) > most_bytes:
        named = named or path
        raise error(f"{quoted(named)} is larger than {most_bytes} bytes, the limit for a {named.name}")
    return content


def first_bytes(path: Path, count: int) -> bytes:
    """Return the first `count` bytes of a regular file, or no bytes if it is not a regular file or cannot be read."""
    try:
        with open_regular_file(path, CheckpointError) as file:
            return file.read(count)
    except (OSError, ValueError):
        return b""


def identity(status: os.stat_result) -> tuple[int, ...]:
    """Return device, inode, size and modification time. They change when a file is replaced or written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

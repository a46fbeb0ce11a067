"""Read a small metadata file after checking its type and size."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from bridge.errors import BridgeError, quoted

_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
"""Opening a pipe with O_NONBLOCK returns at once; Windows has neither of the first two and needs O_BINARY."""


def read_small_file(path: Path, most_bytes: int, error: type[BridgeError], named: Path | None = None) -> bytes:
    """Return the content of a regular file. `named` is its name in messages, by default `path`.

    Raises `error` for a symbolic link, a directory, a pipe or a device, and for a file of more than `most_bytes` bytes.
    Raises `OSError` if the file is missing or cannot be read.
    """
    named = path if named is None else named
    try:
        descriptor = os.open(path, _FLAGS)
    except OSError as problem:
        if problem.errno == errno.ELOOP:
            raise error(f"{quoted(named)} is a symbolic link; a regular file is needed here") from None
        raise
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{quoted(named)} is not a regular file; replace or delete it")
        content = file.read(most_bytes + 1) if status.st_size <= most_bytes else b""
    if max(len(content), status.st_size) > most_bytes:
        raise error(f"{quoted(named)} is larger than {most_bytes} bytes, the limit for a {named.name}")
    return content

"""Advisory locks on files and directories."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive_lock(path: Path, *, is_file: bool = False) -> Iterator[bool | None]:
    """Lock a directory or a file for the duration of a block. The system releases the lock when the process ends.

    Args:
        path: a directory or a file. A link raises `OSError`.
        is_file: `path` is a file, which is created if it does not exist. NFS can lock only writable files.

    Yields:
        True if this process holds the lock, False if another one does, None if the system or the file system has no
        such locks (Windows, object stores).
    """
    try:
        import fcntl
    except ImportError:
        yield None
        return
    descriptor = os.open(path, (os.O_RDWR | os.O_CREAT if is_file else os.O_RDONLY) | os.O_NOFOLLOW, 0o666)
    try:
        held: bool | None = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        except OSError:
            held = None
        if held and not _is_named(descriptor, path):
            held = False  # the path now names another file, which is not locked
        yield held
    finally:
        os.close(descriptor)


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False

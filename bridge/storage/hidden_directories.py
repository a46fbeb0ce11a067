"""Hidden directories in which a writer prepares new data beside its target.

The name is `.TARGET.XXXXXXXX.partial`, with eight hexadecimal digits. `MARKER` is an empty file that shows that this
module created the directory. A lock shows that its writer is alive.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from bridge.errors import CheckpointError, quoted
from bridge.storage.locks import exclusive_lock

MARKER = ".gpt2-bridge"
"""A directory without this file was not made by this module, whatever its name."""
NEW, OLD = "new", "old"
"""Names in the hidden directory: the new data, and the old data if the system cannot exchange two names."""
LEAVING, REPLACED = "leaving", "replaced"
"""Subdirectories for old files, used when a target is filled in place: `LEAVING` is renamed to `REPLACED` once all
old files are in it."""
KEPT = "kept"
"""Subdirectory for old files that could not be moved back after an error. A hidden directory with it is not removed."""


def hidden_name(target: Path) -> Path:
    return target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"


def is_hidden_directory(path: Path, name: str | None = None) -> bool:
    """Whether `path` is a hidden directory of this module for a target called `name`, with its marker or still empty.

    `name`: by default the name of the parent directory.
    """
    name = path.parent.name if name is None else name
    has_name = re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{8}}\.partial", path.name) is not None
    return has_name and _is_own(path) and path.is_dir() and (_is_own(path / MARKER) or not any(path.iterdir()))


def _is_own(path: Path) -> bool:
    """Whether a path is not a link and, on systems with user ids, belongs to the current user."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return not stat.S_ISLNK(status.st_mode) and (not hasattr(os, "geteuid") or status.st_uid == os.geteuid())


@contextmanager
def hidden_directory(target: Path) -> Iterator[Path]:
    """Create a hidden directory for the duration of a block. A lock on it shows that its writer is alive."""
    with ExitStack() as stack:
        while True:
            hidden = hidden_name(target)
            hidden.mkdir(mode=0o700)
            with suppress(FileNotFoundError):  # another process may remove it before it is locked
                (hidden / MARKER).touch()
                if stack.enter_context(exclusive_lock(hidden)) is not False and hidden.exists():
                    break
        try:
            yield hidden
        except BaseException as error:
            for name in (OLD, LEAVING, REPLACED):  # after an error, these hold the user's files
                with suppress(FileNotFoundError):
                    _keep_unless_empty(hidden / name)
            if (hidden / KEPT).exists():
                raise CheckpointError(
                    f"cannot write {quoted(target)}, and files could not be moved back; they are kept in "
                    f"{quoted(hidden / KEPT)}"
                ) from error
            shutil.rmtree(hidden, ignore_errors=True)
            raise
        shutil.rmtree(hidden, ignore_errors=True)


def _keep_unless_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        directory.rename(directory.with_name(KEPT))

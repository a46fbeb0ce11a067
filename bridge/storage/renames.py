"""Publish new data under its final name, by renames that never replace data from other sources.

Linux's renameat2(2) exchanges two names in one step and can refuse to replace. Other systems get the closest sequence
of standard renames. Directories that cannot be renamed are filled file by file.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bridge.errors import CheckpointError, quoted
from bridge.storage.fsync import flush_to_disk
from bridge.storage.hidden_directories import KEPT, LEAVING, NEW, OLD, REPLACED

_AT_WORKING_DIRECTORY, _NO_REPLACE, _EXCHANGE = -100, 1, 2
"""AT_FDCWD, RENAME_NOREPLACE and RENAME_EXCHANGE of Linux's fcntl.h and stdio.h."""


def rename_directory(new: Path, target: Path, check: Callable[[Path], None]) -> None:
    """Rename `new` to `target`. An existing directory moves to the hidden directory if `check` allows it."""
    if not target.is_dir() or not any(target.iterdir()):
        with _checkpoint_error_if_exists(target):
            if os.name == "nt" and target.is_dir():  # rename cannot replace a directory on Windows
                target.rmdir()
            new.rename(target)  # replaces an empty directory and fails for everything else
    elif not _exchanged(new, target, check):
        old = new.with_name(OLD)
        try:
            target.rename(old)
            check(old)
            new.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise


def rename_file(new: Path, target: Path, check: Callable[[Path], None]) -> None:
    """Rename `new` to `target`. An existing file moves to the hidden directory if `check` allows it."""
    if not os.path.lexists(target):
        with _checkpoint_error_if_exists(target):
            rename_without_replacing(new, target)
    elif not _exchanged(new, target, check):
        check(target)
        new.replace(target)


def _exchanged(new: Path, target: Path, check: Callable[[Path], None]) -> bool:
    """Exchange two names in one step, and exchange them back if `check` does not allow it. False if unsupported."""
    ours = _inode(new)
    try:
        if not _rename_at_once(new, target, _EXCHANGE):
            return False
        check(new)
    except BaseException:
        if _inode(target) == ours and not _rename_at_once(new, target, _EXCHANGE):
            new.rename(new.with_name(KEPT))
        raise
    return True


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


@contextmanager
def _checkpoint_error_if_exists(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
            raise
        raise CheckpointError(
            f"{quoted(target)} was created by another program during the write and was not replaced"
        ) from error


def rename_without_replacing(new: Path, target: Path) -> None:
    """Rename `new` to `target`. Raises `FileExistsError` if `target` exists."""
    if _rename_at_once(new, target, _NO_REPLACE):
        return
    if new.is_dir() or os.name == "nt":  # Windows never replaces a file
        new.rename(target)
        return
    try:
        os.link(new, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        new.replace(target)
    else:
        new.unlink()


def _rename_at_once(one: Path, other: Path, flag: int) -> bool:
    """Exchange two names, or rename without replacing, with Linux's renameat2(2). Returns False if it is unsupported.

    Raises `FileExistsError` for `_NO_REPLACE` if `other` exists.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, TypeError, OSError):  # not Linux, or an old C library
        return False
    done = renameat2(_AT_WORKING_DIRECTORY, os.fsencode(one), _AT_WORKING_DIRECTORY, os.fsencode(other), flag) == 0
    if not done and ctypes.get_errno() == errno.EEXIST:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(other))
    return done


def move_in(hidden: Path, directory: Path, remove: Iterable[str], check: Callable[[Path], None]) -> None:
    """Move the files named in `remove` from `directory` into `hidden`, then all of `hidden / NEW` into `directory`.

    The largest files are moved last, and an index of shards after them, so that a partly filled directory is not
    recognised as a checkpoint. An error moves all files back.

    Args:
        check: raises if the directory that it is given holds files that may not be replaced.
    """
    leaving, replaced, new = hidden / LEAVING, hidden / REPLACED, hidden / NEW
    arriving = sorted(new.iterdir(), key=lambda path: (path.name.endswith(".index.json"), path.stat().st_size))
    ours = {path: _inode(path) for path in arriving}
    leaving.mkdir()
    try:
        with _checkpoint_error_if_exists(directory):
            for name in remove:
                with suppress(FileNotFoundError):
                    (directory / name).rename(leaving / name)
            check(leaving)
            flush_to_disk(directory)
            leaving.rename(replaced)
            for path in arriving:
                rename_without_replacing(path, directory / path.name)
    except BaseException:
        back = [(directory / path.name, path) for path in arriving if _inode(directory / path.name) == ours[path]]
        back += [(path, directory / path.name) for folder in (leaving, replaced) for path in _listed(folder)]
        for source, destination in back:
            with suppress(OSError):  # files that cannot be moved back stay in the hidden directory
                rename_without_replacing(source, destination)
        raise
    flush_to_disk(directory)


def complete_move(hidden: Path) -> None:
    """Finish an interrupted `move_in`: undo it if old files were still being moved out, otherwise complete it."""
    forward = _listed(hidden / NEW) if (hidden / REPLACED).exists() else []
    for path in (*_listed(hidden / LEAVING), *forward):
        with suppress(FileExistsError):
            rename_without_replacing(path, hidden.parent / path.name)


def _listed(directory: Path) -> list[Path]:
    return [*directory.iterdir()] if directory.is_dir() and not directory.is_symlink() else []


def is_mount_point(path: Path) -> bool:
    """Whether `path` is a mount point. Unlike os.path.ismount, detects a bind mount from the same file system."""
    return os.path.ismount(path) or path in mount_points()


def mount_points() -> set[Path]:
    """Return the mount points that Linux lists for this process. Empty on other systems."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return set()
    return {Path(_without_octal(mount.split(" ")[4])) for mount in mounts}


def _without_octal(text: str) -> str:
    r"""Decode the octal escapes of proc(5), such as `\040` for a space."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)

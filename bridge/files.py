"""Atomic writes that never destroy what somebody else wrote.

A writer fills a hidden place beside its target, flushes it to the disk, and renames it. The rule of writing, the same
for every format, verb and function:

- Without permission to overwrite, nothing that exists changes, also if it appears while the writer works.
- With permission, only two kinds of file change: those recorded as written by this project, and the files of a
  recognised checkpoint that have names the target's format writes. The caller decides which these are. If a directory
  holds any other file, the write is refused with a list of them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from bridge.errors import CheckpointError, bullet_list, quoted

_NEW, _OLD = "new", "old"
"""Names in the hidden place: what is written, and what it replaces if the system cannot exchange two names."""
_LEAVING, _REPLACED = "leaving", "replaced"
"""Names in a hidden place inside a directory: old files while they are moved out, and once all of them are."""
_KEPT = "kept"
"""Name in a hidden place for files that could not be moved back after an error. Such a place is never removed."""
_MARKER, _MARK = ".gpt2-bridge", b"A hidden place of gpt2-bridge; what is in it was not completely written.\n"
"""A file in every hidden place: a directory that only has such a name is not this project's."""
_AT_WORKING_DIRECTORY, _NO_REPLACE, _EXCHANGE = -100, 1, 2
"""AT_FDCWD, RENAME_NOREPLACE and RENAME_EXCHANGE of Linux's fcntl.h and stdio.h."""

Replaceable = Callable[[str], bool]
"""Whether a file may be replaced, by its path relative to the target directory, with forward slashes."""


@contextmanager
def new_directory(target: str | Path, *, replaceable: Replaceable | None = None) -> Iterator[Path]:
    """Yield a directory to fill. It takes the name `target` when the block ends without an error.

    Until then it stays under a hidden name beside `target`; an error removes it, and the next writer of `target`
    removes what a killed one left. A mount point and the working directory cannot be renamed: their files are moved in
    and out one by one, and the next writer completes what a kill interrupted.

    Args:
        target: a path that does not exist, an empty directory, or with `replaceable` one that holds only such files.
        replaceable: which files of an existing directory the new one replaces. None replaces nothing.

    Raises:
        CheckpointError: `target` exists and may not be replaced, or cannot be written.
    """

    def check(path: Path) -> None:
        if not path.is_dir():
            raise CheckpointError(f"{quoted(target)} exists and is not a directory; choose another name")
        if mounts := [mount for mount in _mount_points() if path in mount.parents]:
            raise CheckpointError(f"{quoted(mounts[0])} is a mount point inside the target; choose another name")
        if replaceable is not None:
            require_replaceable(path, replaceable, name=target)
        elif foreign_files(path, lambda name: False):
            raise CheckpointError(_exists(target))

    with _destination(target, check) as path:
        stays = path.is_dir() and (_is_mount_point(path) or path == Path.cwd())
        with _hidden_place(path / path.name if stays else path) as place:
            new = place / _NEW
            new.mkdir()
            yield new
            if path.is_dir():
                shutil.copymode(path, new)
            _flush_tree(new)
            if stays:
                names = [p.name for p in path.iterdir() if not _is_hidden_place(p)]
                check(path)
                _move_in(place, path, names, check)
            else:
                _rename_directory(new, path, check)
                flush_to_disk(path.parent)


@contextmanager
def new_file(target: str | Path, *, overwrite: bool | Callable[[], bool] = False) -> Iterator[Path]:
    """Yield the path of a file to write. It takes the name `target` as the directory of `new_directory` does.

    Args:
        target: a path that does not exist, or with `overwrite` a file.
        overwrite: whether the file at `target` may be replaced, or a function that inspects it. If another file comes
            in its place afterwards, that file is kept and the write fails.

    Raises:
        CheckpointError: `target` exists and may not be replaced, or cannot be written.
    """
    before = _identity(Path(target))
    is_replaceable = overwrite() if callable(overwrite) else overwrite

    def check(path: Path) -> None:
        if path.is_dir():
            raise CheckpointError(f"{quoted(target)} is a directory; give the name of a file")
        if not is_replaceable:
            raise CheckpointError(_exists(target))
        if not path.is_file():
            raise CheckpointError(f"{quoted(target)} exists and is not a file; choose another name")
        if _identity(path) != before:
            raise CheckpointError(f"{quoted(target)} changed while it was written, and is kept; try again")

    with _destination(target, check) as path:
        if _is_mount_point(path):
            raise CheckpointError(f"{quoted(target)} is a mount point and cannot be replaced; choose another name")
        with _hidden_place(path) as place:
            new = place / _NEW
            yield new
            flush_to_disk(new)
            _rename_file(new, path, check)
            flush_to_disk(path.parent)


def replace_files(directory: Path, files: Mapping[str, str], remove: Iterable[str] = ()) -> None:
    """Write `files`, name -> text, into `directory`, and remove those named in `remove`. The others stay.

    Old files leave before new ones arrive, so a kill in between leaves an incomplete set and no mixture; the next
    writer completes it. Makes the directory if there is none.

    Raises:
        CheckpointError: the directory cannot be written to. It is left as it was.
    """

    def write(new: Path) -> None:
        for name, text in files.items():
            (new / name).write_bytes(text.encode())

    def check(path: Path) -> None:
        if not path.is_dir():
            raise CheckpointError(f"{quoted(directory)} is not a directory; choose another name")
        for name in leaving:
            if (path / name).is_dir() or (path / name).is_symlink():
                raise CheckpointError(f"{quoted(path / name)} is a directory or a link; move it away")

    if not os.path.lexists(directory):
        with new_directory(directory) as new:
            write(new)
        return
    leaving = {*remove, *files}
    with _destination(directory, check) as path, _hidden_place(path / path.name) as place:
        (place / _NEW).mkdir()
        write(place / _NEW)
        _flush_tree(place / _NEW)
        _move_in(place, path, leaving, check)


def require_replaceable(directory: Path, replaceable: Replaceable, name: str | Path | None = None) -> None:
    """Raise `CheckpointError`, with a list, if `directory` holds files that may not be replaced.

    `name`: what the message calls the directory; by default its path.
    """
    if kept := foreign_files(directory, replaceable):
        raise CheckpointError(
            f"{quoted(name or directory)} is not overwritten, because it also holds files that this would not write; "
            f"choose another name, or move them away:\n{bullet_list(map(quoted, kept))}"
        )


def foreign_files(directory: Path, replaceable: Replaceable) -> list[str]:
    """List what `directory` holds that may not be replaced, by relative path; a directory's path ends with a slash.

    A link or a device is foreign whatever its name. Hidden places of this module are skipped, and nothing below a
    foreign directory is read.
    """
    foreign = []
    folders = [directory]
    while folders:
        folder = folders.pop()
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            path = Path(entry.path)
            name = path.relative_to(directory).as_posix()
            if entry.is_dir(follow_symlinks=False):
                if replaceable(name + "/"):
                    folders.append(path)
                elif not (folder == directory and _is_hidden_place(path)):
                    foreign.append(name + "/")
            elif not (entry.is_file(follow_symlinks=False) and replaceable(name)):
                foreign.append(name)
    return foreign


def flush_to_disk(path: Path) -> None:
    """fsync a file, or the names in a directory where the system can open one."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes only what it may write
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive_lock(path: Path, *, is_file: bool = False) -> Iterator[bool | None]:
    """Hold the lock of a directory or a file for a block. The system drops the lock when the process ends.

    Yields:
        True if the lock is held, False if another process holds it, None if the system or the file system has no such
        locks (Windows, object stores). NFS only has locks of files, for those who may write to them.

    Args:
        path: a directory, or a file; a link is an `OSError`.
        is_file: lock a file, which is created if there is none.
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
            held = False  # another file has the name now, and its lock is not this one
        yield held
    finally:
        os.close(descriptor)


@contextmanager
def _destination(target: str | Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """Yield the path that `target` names, links followed, with its parents made and killed writers' leftovers removed.

    `check` raises for an existing path that may not be replaced. Parents that were made are removed if nothing was
    written. An `OSError` of the block becomes a `CheckpointError` that names `target`.
    """
    path = _resolved(target)
    made: list[Path] = []
    try:
        made = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_away(path)
        if path.is_dir():
            _clear_away(path / path.name)
        if os.path.lexists(path):
            check(path)
        yield path
        for parent in made:
            flush_to_disk(parent.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {quoted(target)}: {error.strerror or error}") from error
    finally:
        for parent in made:
            with suppress(OSError):  # it holds the target
                parent.rmdir()


def _resolved(target: str | Path) -> Path:
    """Follow links, so that a rename replaces the data and not a link to it."""
    try:
        if os.path.islink(target) and not os.path.exists(target):
            raise CheckpointError(f"{quoted(target)} is a link to nothing; remove the link, or choose another name")
        return Path(target).resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError up to Python 3.12, for links in a circle
        raise CheckpointError(f"cannot write {quoted(target)}: {error}") from error


def _exists(target: str | Path) -> str:
    return f"{quoted(target)} exists; choose another name, remove it, or overwrite it (--overwrite, or overwrite=True)"


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _is_mount_point(path: Path) -> bool:
    return os.path.ismount(path) or path in _mount_points()


def _mount_points() -> set[Path]:
    """All of this process on Linux: os.path.ismount does not detect a bind mount from the same file system."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return set()
    return {Path(_without_octal(mount.split(" ")[4])) for mount in mounts}


def _without_octal(text: str) -> str:
    r"""A path as proc(5) spells it: a space is `\040`."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _flush_tree(directory: Path) -> None:
    for path in (directory, *directory.rglob("*")):
        flush_to_disk(path)


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _hidden_name(target: Path) -> Path:
    return target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"


def _is_hidden_place(path: Path, name: str | None = None) -> bool:
    """Whether `path` is a hidden place of this module for a target called `name`; by default as its directory is."""
    name = path.parent.name if name is None else name
    if re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{8}}\.partial", path.name) is None or not _is_own(path):
        return False
    try:
        return _is_own(path / _MARKER) and (path / _MARKER).read_bytes() == _MARK
    except OSError:
        return False


def _is_own(path: Path) -> bool:
    """Whether a path is no link, and belongs to this user where the system has users."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return not stat.S_ISLNK(status.st_mode) and (not hasattr(os, "geteuid") or status.st_uid == os.geteuid())


@contextmanager
def _hidden_place(target: Path) -> Iterator[Path]:
    """Make a directory for this block alone. Its lock tells other processes that its writer is alive."""
    with ExitStack() as stack:
        while True:
            place = _hidden_name(target)
            place.mkdir(mode=0o700)
            with suppress(FileNotFoundError):  # another process may remove it before it is locked
                (place / _MARKER).write_bytes(_MARK)
                if stack.enter_context(exclusive_lock(place)) is not False and place.exists():
                    break
        try:
            yield place
        except BaseException as error:
            for name in (_OLD, _LEAVING, _REPLACED):  # what an error left in them belongs to somebody
                with suppress(FileNotFoundError):
                    _keep_unless_empty(place / name)
            if (place / _KEPT).exists():
                raise CheckpointError(
                    f"cannot write {quoted(target)}, and files could not be moved back; they are kept in "
                    f"{quoted(place / _KEPT)}"
                ) from error
            shutil.rmtree(place, ignore_errors=True)
            raise
        shutil.rmtree(place, ignore_errors=True)


def _keep_unless_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        directory.rename(directory.with_name(_KEPT))


def _clear_away(target: Path) -> None:
    """Remove what killed writers of `target` left. Without locks nothing is removed."""
    for place in [p for p in target.parent.iterdir() if _is_hidden_place(p, target.name) and p.is_dir()]:
        with suppress(OSError), exclusive_lock(place) as held:
            if held and not (place / _KEPT).exists() and not any(path.is_symlink() for path in place.iterdir()):
                if (place / _OLD).exists() and not target.exists():
                    (place / _OLD).rename(target)  # the writer was killed between two renames
                _complete_move(place)
                # Renamed first: a writer whose lock this machine does not see then fails, and names nothing incomplete.
                shutil.rmtree(place.rename(_hidden_name(target)), ignore_errors=True)


def _rename_directory(new: Path, target: Path, check: Callable[[Path], None]) -> None:
    """Give `new` the name `target`. A directory that had the name goes to the hidden place, if `check` allows it."""
    if not target.is_dir() or not any(target.iterdir()):
        with _kept_if_it_appeared(target):
            if os.name == "nt" and target.is_dir():  # Windows replaces no directory
                target.rmdir()
            new.rename(target)  # replaces an empty directory and fails for everything else
    elif not _exchanged(new, target, check):
        old = new.with_name(_OLD)
        try:
            target.rename(old)
            check(old)
            new.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise


def _rename_file(new: Path, target: Path, check: Callable[[Path], None]) -> None:
    """Give `new` the name `target`. A file that had the name goes to the hidden place, if `check` allows it."""
    if not os.path.lexists(target):
        with _kept_if_it_appeared(target):
            _rename_without_replacing(new, target)
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
            new.rename(new.with_name(_KEPT))
        raise
    return True


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


@contextmanager
def _kept_if_it_appeared(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
            raise
        raise CheckpointError(f"{quoted(target)} appeared while it was written, and is kept") from error


def _rename_without_replacing(new: Path, target: Path) -> None:
    """Raises `FileExistsError` if `target` exists."""
    if _rename_at_once(new, target, _NO_REPLACE):
        return
    if new.is_dir() or os.name == "nt":  # Windows never replaces a file
        new.rename(target)
        return
    try:
        os.link(new, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        new.replace(target)
    else:
        new.unlink()


def _rename_at_once(one: Path, other: Path, flag: int) -> bool:
    """Linux's renameat2(2): exchange two names, or rename without replacing. False where it cannot be done.

    Raises `FileExistsError` for `_NO_REPLACE` if `other` exists.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, TypeError, OSError):  # another system
        return False
    done = renameat2(_AT_WORKING_DIRECTORY, os.fsencode(one), _AT_WORKING_DIRECTORY, os.fsencode(other), flag) == 0
    if not done and ctypes.get_errno() == errno.EEXIST:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(other))
    return done


def _move_in(place: Path, directory: Path, remove: Iterable[str], check: Callable[[Path], None]) -> None:
    """Move files named in `remove` out of `directory` into `place`, then all of `place / _NEW` into the directory.

    The largest files come last, and an index of them at the very end: until then the directory is no checkpoint.
    `check` raises for files that may not be replaced. After an error everything is moved back.
    """
    leaving, replaced, new = place / _LEAVING, place / _REPLACED, place / _NEW
    arriving = sorted(new.iterdir(), key=lambda path: (path.name.endswith(".index.json"), path.stat().st_size))
    ours = {path: _inode(path) for path in arriving}
    leaving.mkdir()
    try:
        with _kept_if_it_appeared(directory):
            for name in remove:
                with suppress(FileNotFoundError):
                    (directory / name).rename(leaving / name)
            check(leaving)
            flush_to_disk(directory)
            leaving.rename(replaced)
            for path in arriving:
                _rename_without_replacing(path, directory / path.name)
    except BaseException:
        back = [(directory / path.name, path) for path in arriving if _inode(directory / path.name) == ours[path]]
        back += [(path, directory / path.name) for folder in (leaving, replaced) for path in _listed(folder)]
        for here, there in back:
            with suppress(OSError):  # what cannot be moved back is kept in the hidden place
                _rename_without_replacing(here, there)
        raise
    flush_to_disk(directory)


def _complete_move(place: Path) -> None:
    """End what `_move_in` was doing when it was killed: back if old files were still leaving, else forward."""
    forward = _listed(place / _NEW) if (place / _REPLACED).exists() else []
    for path in (*_listed(place / _LEAVING), *forward):
        with suppress(FileExistsError):
            _rename_without_replacing(path, place.parent / path.name)


def _listed(directory: Path) -> list[Path]:
    return [*directory.iterdir()] if directory.is_dir() and not directory.is_symlink() else []

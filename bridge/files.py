"""Writing that is all or nothing: beside the target, flushed to the disk, then renamed."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from bridge.errors import CheckpointError, quoted

_NEW, _OLD = "new", "old"
"""What the hidden place has: what is written, and where the system cannot exchange names, what it replaces."""
_FROM_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE, of Linux's fcntl.h and stdio.h


@contextmanager
def new_directory(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A directory to fill, which takes the name `target` only when the block ends without an error.

    Until then it stands beside `target` under a hidden name, and on an error it is removed. What a process leaves
    that was killed, the next one that writes `target` removes.
    Raises `CheckpointError` where `target` exists and is not an empty directory, unless
    `overwrite`, in which case the old one gives way only to the complete new one.
    """
    with _beside(target, overwrite) as directory:
        directory.mkdir()
        yield directory


@contextmanager
def new_file(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """The path of a file to write, which takes the name `target` as a `new_directory` does."""
    if not overwrite and Path(target).is_dir():
        raise CheckpointError(f"{quoted(Path(target))} is a directory; give the name of a file")
    with _beside(target, overwrite) as file:
        yield file


@contextmanager
def _beside(target: str | Path, overwrite: bool) -> Iterator[Path]:
    """A free name in a hidden place beside `target`; what is made there is flushed to the disk and takes its place."""
    try:
        # resolve() follows a link to where the data really is, so that the rename replaces that.
        target = Path(target).resolve()
        made = [parent for parent in target.parents if not parent.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_away(target)
        if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
            raise CheckpointError(
                f"{quoted(target)} exists; choose another name, remove it, or overwrite it "
                "(--overwrite, or overwrite=True)"
            )
    except OSError as error:
        raise CheckpointError(f"cannot write {quoted(target)}: {error.strerror}") from error
    except RuntimeError as error:  # what resolve() raises for links in a circle, up to Python 3.12
        raise CheckpointError(f"cannot write {quoted(target)}: {error}") from error
    try:
        with _hidden_place(target) as place:
            new = place / _NEW
            yield new
            for path in (new, *new.rglob("*")):
                flush_to_disk(path)
            _take_the_name(new, target, overwrite)
            for path in (target, *made):
                flush_to_disk(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {quoted(target)}: {error.strerror or error}") from error
    finally:
        for parent in made:
            with suppress(OSError):  # it holds the target: keep it
                parent.rmdir()


def replace_files(directory: Path, files: Mapping[str, str], remove: Iterable[str] = ()) -> None:
    """Put `files`, name -> text, into `directory`, in the place of those named in `remove`.

    Nothing is touched before all are on the disk under other names; then all of the old ones go before the first new
    one comes, so that what is left by a kill between is incomplete and not a mixture. Makes the directory where there
    is none; raises `CheckpointError` where it cannot be written, and leaves it as it was.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=directory) as beside:
            for name, text in files.items():
                (Path(beside) / name).write_bytes(text.encode())
                flush_to_disk(Path(beside) / name)
            old = Path(beside) / _OLD
            old.mkdir()
            try:
                for name in {*remove, *files}:
                    if (directory / name).is_dir():
                        raise CheckpointError(f"{quoted(directory / name)} is a directory; move it away")
                    with suppress(FileNotFoundError):
                        (directory / name).rename(old / name)
                flush_to_disk(directory)
                for name in files:
                    (Path(beside) / name).rename(directory / name)
            except BaseException:
                for path in old.iterdir():
                    path.replace(directory / path.name)
                raise
        flush_to_disk(directory)
    except OSError as error:
        raise CheckpointError(f"cannot write into {quoted(directory)}: {error.strerror or error}") from error


def flush_to_disk(path: Path) -> None:
    """fsync a file, or the list of names that a directory is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive_lock(path: Path, *, is_file: bool = False) -> Iterator[bool | None]:
    """Hold the lock of a directory, or of a file, which is made where there is none, for a block. Gives whether it is
    held: False where another holds it, None where the file system has no locks, as those over object stores.

    The system forgets the lock with the process, however that ends. NFS has locks of files alone, and for those alone
    who may write to them.
    """
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT if is_file else os.O_RDONLY, 0o666)
    try:
        held: bool | None = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        except OSError:
            held = None
        if held and not _is_named(descriptor, path):
            held = False  # another has the name now, whose lock is not this one
        yield held
    finally:
        os.close(descriptor)


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _hidden_name(target: Path) -> Path:
    return target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"


@contextmanager
def _hidden_place(target: Path) -> Iterator[Path]:
    """A directory of this block alone; its lock tells others that somebody still writes here."""
    with ExitStack() as stack:
        while True:
            place = _hidden_name(target)
            place.mkdir()
            with suppress(FileNotFoundError):  # between its making and its lock another may have cleared it away
                if stack.enter_context(exclusive_lock(place)) is not False and place.exists():
                    break
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        yield place


def _clear_away(target: Path) -> None:
    """Remove what killed processes left of writing `target`. Where there are no locks nothing is removed."""
    hidden = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.partial")
    for place in [p for p in target.parent.iterdir() if hidden.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]:
        with suppress(OSError), exclusive_lock(place) as held:
            if held:
                if (place / _OLD).exists() and not target.exists():
                    (place / _OLD).rename(target)  # it was killed when neither had the name
                # Renamed first: a writer whose lock is not seen from this machine then fails, and names nothing half.
                shutil.rmtree(place.rename(_hidden_name(target)), ignore_errors=True)


def _take_the_name(new: Path, target: Path, overwrite: bool) -> None:
    """Make `target` the name of `new`; what had it before, if anything did, goes to where `new` was."""
    if not overwrite or not target.exists() or (new.is_file() and target.is_file()):
        new.rename(target)  # replaces a file, and an empty directory; fails if somebody has filled it meanwhile
    elif not _exchanged(new, target):
        old = new.with_name(_OLD)
        target.rename(old)
        try:
            new.rename(target)
        except OSError:
            old.rename(target)
            raise


def _exchanged(one: Path, other: Path) -> bool:
    """Whether each has the other's name now, in one step; Linux can, on most file systems."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, TypeError):  # another system
        return False
    done: int = renameat2(_FROM_HERE, os.fsencode(one), _FROM_HERE, os.fsencode(other), _EXCHANGE)
    return done == 0

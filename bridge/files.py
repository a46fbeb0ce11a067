"""Writing that is all or nothing: beside the target, flushed to the disk, then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from bridge.errors import CheckpointError, quoted


@contextmanager
def new_directory(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A directory to fill, which takes the name `target` only when the block ends without an error.

    Until then it stands beside `target` under a hidden name, and on an error it is removed.
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
    """A free name beside `target`; what is made there is flushed to the disk and takes its place."""
    try:
        # resolve() follows a link to where the data really is, so that the rename replaces that.
        target = Path(target).resolve()
        if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
            raise CheckpointError(
                f"{quoted(target)} exists; choose another name, remove it, or overwrite it "
                "(--overwrite, or overwrite=True)"
            )
        made = [parent for parent in target.parents if not parent.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {quoted(target)}: {error.strerror}") from error
    except RuntimeError as error:  # what resolve() raises for links in a circle, up to Python 3.12
        raise CheckpointError(f"cannot write {quoted(target)}: {error}") from error
    beside = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        yield beside
        for path in (beside, *beside.rglob("*")):
            flush_to_disk(path)
        _take_the_name(beside, target, overwrite)
        flush_to_disk(target.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {quoted(target)}: {error.strerror or error}") from error
    finally:
        _remove(beside)
        for parent in made:
            with suppress(OSError):  # it holds the target: keep it
                parent.rmdir()


def replace_files(directory: Path, files: Mapping[str, str], remove: Iterable[str] = ()) -> None:
    """Put `files`, name -> text, into `directory`, in the place of those named in `remove`.

    Nothing is touched before all are on the disk under other names. Makes the directory where there is
    none; raises `CheckpointError` where it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=directory) as beside:
            for name, text in files.items():
                (Path(beside) / name).write_bytes(text.encode())
                flush_to_disk(Path(beside) / name)
            for name in {*remove} - {*files}:
                (directory / name).unlink(missing_ok=True)
            for name in files:
                (Path(beside) / name).replace(directory / name)
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


def _take_the_name(beside: Path, target: Path, overwrite: bool) -> None:
    if not overwrite or not target.exists():
        beside.rename(target)  # replaces an empty directory; fails if somebody has filled it meanwhile
        return
    retired = beside.with_suffix(".retired")
    target.rename(retired)
    try:
        beside.rename(target)
    except OSError:
        retired.rename(target)
        raise
    _remove(retired)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

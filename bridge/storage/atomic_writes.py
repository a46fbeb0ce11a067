"""Atomic writes that never destroy files from other sources.

A writer fills a hidden directory beside its target, flushes it to the disk, and renames it. Every format, command
and function follows the same two rules:

- Without permission to overwrite, no existing file changes, not even one that appears during the write.
- With permission, only three kinds of file change: files recorded as written by this project; the weights and
  `config.json` of a recognised checkpoint, if the target format uses these names too; and files that are written again.
  The caller decides which files these are. If a directory holds other files, the write is refused with a list of those
  files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from bridge.errors import CheckpointError, bullet_list, quoted
from bridge.storage.fsync import flush_to_disk, flush_tree
from bridge.storage.hidden_directories import KEPT, NEW, OLD, hidden_directory, hidden_name, is_hidden_directory
from bridge.storage.locks import exclusive_lock
from bridge.storage.regular_file import identity
from bridge.storage.renames import (
    complete_move,
    is_mount_point,
    mount_points,
    move_in,
    rename_directory,
    rename_file,
)

Replaceable = Callable[[str], bool]
"""Takes a file's path relative to the target directory, with forward slashes. Returns whether it may be replaced."""


@contextmanager
def new_directory(target: str | Path, *, replaceable: Replaceable | None = None) -> Iterator[Path]:
    """Yield a directory to fill. It is renamed to `target` when the block ends without an error.

    Until then it has a hidden name beside `target`. An error removes it. The next writer of `target` removes what a
    killed writer left behind. A mount point and the working directory cannot be renamed: their files are moved in and
    out one by one, and the next writer completes or reverts an interrupted move.

    Args:
        target: a path that does not exist, an empty directory, or a directory that holds only `replaceable` files.
        replaceable: which files of an existing directory may be replaced. None means no file.

    Raises:
        CheckpointError: `target` exists and may not be replaced, or cannot be written.
    """

    def check(path: Path) -> None:
        if not path.is_dir():
            raise CheckpointError(f"{quoted(target)} exists and is not a directory; choose another name")
        if mounts := [mount for mount in mount_points() if path in mount.parents]:
            raise CheckpointError(f"{quoted(mounts[0])} is a mount point inside the target; choose another name")
        if replaceable is not None:
            require_replaceable(path, replaceable, name=target)
        elif foreign_files(path, lambda name: False):
            raise CheckpointError(_exists(target))

    with _destination(target, check) as path:
        in_place = path.is_dir() and (is_mount_point(path) or path == Path.cwd())
        with hidden_directory(path / path.name if in_place else path) as hidden:
            new = hidden / NEW
            new.mkdir()
            yield new
            if path.is_dir():
                shutil.copymode(path, new)
            flush_tree(new)
            if in_place:
                names = [p.name for p in path.iterdir() if not is_hidden_directory(p)]
                check(path)
                move_in(hidden, path, names, check)
            else:
                rename_directory(new, path, check)
                flush_to_disk(path.parent)


@contextmanager
def new_file(target: str | Path, *, overwrite: bool | Callable[[], bool] = False) -> Iterator[Path]:
    """Yield the path of a file to write. It is renamed to `target` when the block ends without an error.

    Args:
        target: a path that does not exist or, with `overwrite`, an existing file.
        overwrite: whether the file at `target` may be replaced, or a function that inspects the file and decides.
            If the file changes after the decision, it is not replaced and the write fails.

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
            raise CheckpointError(
                f"{quoted(target)} was changed by another program during the write and was not replaced; try again"
            )

    with _destination(target, check) as path:
        if is_mount_point(path):
            raise CheckpointError(f"{quoted(target)} is a mount point and cannot be replaced; choose another name")
        with hidden_directory(path) as hidden:
            new = hidden / NEW
            yield new
            flush_to_disk(new)
            rename_file(new, path, check)
            flush_to_disk(path.parent)


def replace_files(directory: Path, files: Mapping[str, str | bytes], remove: Iterable[str] = ()) -> None:
    """Write `files`, relative path -> content, into `directory`, and remove the files in `remove`. Other files stay.

    All old files are moved out before new files are moved in. A killed writer therefore leaves an incomplete set of
    files, never a mixture of old and new; the next writer completes it. Creates `directory` if it does not exist. A
    folder of `directory` is replaced as a whole, and may hold only files in `files` and `remove`.

    Raises:
        CheckpointError: the directory cannot be written to. It is unchanged.
    """
    own = {*remove, *files}
    leaving = {name.partition("/")[0] for name in own}

    def write(new: Path) -> None:
        for name, content in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(content.encode() if isinstance(content, str) else content)

    def check(path: Path) -> None:
        if not path.is_dir():
            raise CheckpointError(f"{quoted(directory)} is not a directory; choose another name")
        for name in leaving:
            folder = path / name
            if folder.is_symlink() or (folder.is_dir() and name in own):
                raise CheckpointError(f"{quoted(folder)} is a directory or a link; move it away")
            if folder.is_dir():
                inside = {file.removeprefix(f"{name}/") for file in own if file.startswith(f"{name}/")}
                require_replaceable(folder, inside.__contains__, directory / name)

    if not os.path.lexists(directory):
        with new_directory(directory) as new:
            write(new)
        return
    with _destination(directory, check) as path, hidden_directory(path / path.name) as hidden:
        (hidden / NEW).mkdir()
        write(hidden / NEW)
        flush_tree(hidden / NEW)
        move_in(hidden, path, leaving, check)


def require_replaceable(directory: Path, replaceable: Replaceable, name: str | Path | None = None) -> None:
    """Raise a `CheckpointError` if `directory` holds files that may not be replaced. The message lists them.

    Args:
        directory: the directory to check.
        replaceable: which of its files may be replaced.
        name: what the message calls the directory; by default its path.
    """
    if foreign := foreign_files(directory, replaceable):
        raise CheckpointError(
            f"{quoted(name or directory)} is not overwritten, because it holds files that this command does not write; "
            f"choose another name, or move them away:\n{bullet_list(map(quoted, foreign))}"
        )


def foreign_files(directory: Path, replaceable: Replaceable) -> list[str]:
    """List the relative paths of all files below `directory` that may not be replaced. Directories end with a slash.

    Links and devices are always foreign. Hidden directories of this module are skipped. A foreign directory is listed
    without its content.
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
                elif not (folder == directory and is_hidden_directory(path)):
                    foreign.append(name + "/")
            elif not (entry.is_file(follow_symlinks=False) and replaceable(name)):
                foreign.append(name)
    return foreign


@contextmanager
def _destination(target: str | Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """Resolve links in `target`, create its parent directories, remove leftovers of killed writers, yield the path.

    `check` raises if an existing path may not be replaced. Created parents are removed again if they remain empty. An
    `OSError` in the block becomes a `CheckpointError` that names `target`.
    """
    path = _resolved(target)
    made: list[Path] = []
    try:
        made = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        if path.is_dir():
            _remove_leftovers(path / path.name)
        if os.path.lexists(path):
            check(path)
        yield path
        for parent in made:
            flush_to_disk(parent.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {quoted(target)}: {error.strerror or error}") from error
    finally:
        for parent in made:
            with suppress(OSError):  # not empty: it holds the target
                parent.rmdir()


def _resolved(target: str | Path) -> Path:
    """Follow links, so that a rename replaces the data and not a link to it."""
    try:
        if os.path.islink(target) and not os.path.exists(target):
            raise CheckpointError(f"{quoted(target)} is a broken link; remove the link, or choose another name")
        return Path(target).resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError up to Python 3.12, for a cycle of links
        raise CheckpointError(f"cannot write {quoted(target)}: {error}") from error


def _exists(target: str | Path) -> str:
    return (
        f"{quoted(target)} exists; choose another name, or replace a checkpoint there (--overwrite, or overwrite=True)"
    )


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        return identity(os.stat(path))
    except OSError:
        return None


def _remove_leftovers(target: Path) -> None:
    """Remove hidden directories that killed writers of `target` left behind. Does nothing on systems without locks."""
    for hidden in [p for p in target.parent.iterdir() if is_hidden_directory(p, target.name)]:
        with suppress(OSError), exclusive_lock(hidden) as held:
            if held and not (hidden / KEPT).exists() and not any(path.is_symlink() for path in hidden.iterdir()):
                if (hidden / OLD).exists() and not target.exists():
                    (hidden / OLD).rename(target)  # the writer was killed between two renames
                complete_move(hidden)
                # A live writer on another machine may hold a lock that is invisible here. The rename makes that
                # writer fail instead of publishing incomplete data.
                shutil.rmtree(hidden.rename(hidden_name(target)), ignore_errors=True)

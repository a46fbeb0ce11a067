"""What a directory holds, file by file, so that a damaged one is known before anything in it is used.

The manifest is written last, when all else is on the disk, and is sealed itself: `files` has the size and SHA-256 of
every file, `about` says whose they are, `seal` is the SHA-256 of both.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from bridge.errors import CheckpointError, quoted
from bridge.files import flush_to_disk

MANIFEST = "manifest.json"
_ENTRY = {"bytes": int, "sha256": str}
_MOST_BYTES = 2**26
"""Of a manifest: a checkpoint of many hosts has some ten thousand files."""


def seal(directory: Path, about: Mapping[str, Any]) -> None:
    """Put what is below `directory` on the disk, and a manifest of it, with what it is, into it."""
    files = {}
    manifest = directory / MANIFEST
    manifest.unlink(missing_ok=True)
    for path in _files(directory):
        flush_to_disk(path)
        files[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest.write_bytes(_rendered({"about": dict(about), "files": files}))
    flush_to_disk(manifest)
    for folder in (directory, *(path for path in directory.rglob("*") if path.is_dir())):
        flush_to_disk(folder)


def amend(directory: Path, changes: Mapping[str, Any], beside: Path) -> None:
    """Say something else of a sealed directory; the file `beside` it is where the new manifest is written first.

    Raises as `about`.
    """
    content = _read(directory)
    beside.write_bytes(_rendered({"about": {**content["about"], **changes}, "files": content["files"]}))
    flush_to_disk(beside)
    beside.replace(directory / MANIFEST)
    flush_to_disk(directory)


def about(directory: Path) -> dict[str, Any]:
    """What the manifest says that the directory is; the files are not looked at.

    Raises `CheckpointError` where there is none, or it is not as it was written.
    """
    return _read(directory)["about"]


def verify(directory: Path, *, from_disk: bool = False) -> dict[str, Any]:
    """As `about`, once every file was read and found to be as it was written, and no other there.

    `from_disk`: and not what the system still has of the files in memory, where it can be asked to forget that. Raises
    `CheckpointError` naming the first that is not, and for a link or anything else that is no file.
    """
    try:
        return _verified(directory, from_disk)
    except OSError as error:  # a disk that fails, or somebody removes it meanwhile
        raise CheckpointError(
            f"cannot read {quoted(error.filename or directory)}: {error.strerror or error}"
        ) from error


def recorded(directory: Path) -> frozenset[str]:
    """List what a sealed directory may hold: the files of its manifest, their directories, and the manifest itself.

    Directories end with a slash. Empty if there is no manifest, or it is not as it was written.
    """
    try:
        files = _read(directory)["files"]
    except CheckpointError:
        return frozenset()
    folders = {f"{folder.as_posix()}/" for name in files for folder in PurePosixPath(name).parents}
    return frozenset({MANIFEST, *files, *folders})


def _verified(directory: Path, from_disk: bool) -> dict[str, Any]:
    content = _read(directory)
    there = {path.relative_to(directory).as_posix(): path for path in _files(directory)}
    there.pop(MANIFEST)
    for name in {**content["files"], **there}:
        if name not in there:
            raise CheckpointError(f"{quoted(directory / name)} is missing")
        if name not in content["files"]:
            raise CheckpointError(f"{quoted(there[name])} is not in the manifest")
        expected, size = content["files"][name], there[name].stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{quoted(there[name])} has {size} bytes, and was written with {expected['bytes']}")
    for name, path in there.items():
        if _sha256(path, from_disk) != content["files"][name]["sha256"]:
            raise CheckpointError(f"{quoted(path)} is not as it was written")
    about: dict[str, Any] = content["about"]
    return about


def _read(directory: Path) -> dict[str, Any]:
    manifest = directory / MANIFEST
    if directory.is_symlink():
        raise CheckpointError(f"{quoted(directory)} is a link; a checkpoint is none")
    try:
        status = os.lstat(manifest)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            raise CheckpointError(f"{quoted(manifest)} is no manifest")
        written = manifest.read_bytes()
        content: dict[str, Any] = json.loads(written)
        del content["seal"]
        if {*content} != {"about", "files"} or written != _rendered(content):
            raise ValueError
        if not isinstance(content["about"], dict) or not all(map(_is_entry, content["files"].values())):
            raise ValueError
    except FileNotFoundError as error:
        raise CheckpointError(f"{quoted(directory)} has no manifest: it was not written to its end") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {quoted(manifest)}: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise (
            error
            if isinstance(error, CheckpointError)
            else CheckpointError(f"{quoted(manifest)} is not as it was written")
        ) from error
    return content


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and {name: type(value) for name, value in entry.items()} == _ENTRY


def _files(directory: Path) -> Iterator[Path]:
    """All below it, in the order of their names; a link may lead anywhere, and is refused."""
    for path in sorted(directory.rglob("*")):
        mode = os.lstat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise CheckpointError(f"{quoted(path)} is a link, or no file; a checkpoint has neither")
        if stat.S_ISREG(mode):
            yield path


def _sha256(path: Path, from_disk: bool = False) -> str:
    with open(path, "rb") as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rendered(content: Mapping[str, Any]) -> bytes:
    """The manifest, byte for byte: of what has another byte nothing is believed."""
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**content, "seal": seal}, indent=1) + "\n").encode()

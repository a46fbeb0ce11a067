"""Manifests: sizes and digests of all files in a directory, to detect damage before a file is used.

The manifest is written last, after all other files are on the disk. `files` has the size and SHA-256 of every file,
`about` describes the directory, and `seal` is the SHA-256 of both.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from bridge.errors import CheckpointError, quoted
from bridge.storage.fsync import flush_to_disk
from bridge.storage.json_text import require_few_elements
from bridge.storage.regular_file import read_small_file

MANIFEST = "manifest.json"
_ENTRY = {"bytes": int, "sha256": str}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_BYTES, _MOST_ABOUT_BYTES = 2**22, 2**16
"""Size limits of a manifest and of its `about`. A checkpoint of many hosts has about 10,000 entries of 200 bytes."""
_LONGEST_NAME, _MOST_FOLDERS = 4096, 32
"""Limits of a file's path in a manifest: its length in characters, and how many directories it names."""
_MOST_ELEMENTS = 200_000
"""Limit on brackets, commas and colons in a manifest. Parsed JSON takes up to a hundred bytes for each."""


def commit(directory: Path, about: Mapping[str, Any]) -> None:
    """Flush all files below `directory` to the disk, then write a manifest of them that includes `about`."""
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
    """Update the `about` of a committed directory. The new manifest is written to the file `beside` and then renamed.

    Raises the same errors as `about`.
    """
    content = _read(directory)
    beside.write_bytes(_rendered({"about": {**content["about"], **changes}, "files": content["files"]}))
    flush_to_disk(beside)
    beside.replace(directory / MANIFEST)
    flush_to_disk(directory)


def about(directory: Path) -> dict[str, Any]:
    """Return the `about` of the manifest without checking the files.

    Raises `CheckpointError` if the manifest is missing or was changed.
    """
    return _read(directory)["about"]


def recorded_sha256(directory: Path, name: str) -> str:
    """Return the SHA-256 of a file that the manifest records, without checking the file.

    Raises `CheckpointError` if the manifest is missing or was changed, or does not record the file.
    """
    files = _read(directory)["files"]
    if name not in files:
        raise CheckpointError(f"{quoted(directory / name)} is not in the manifest")
    sha256: str = files[name]["sha256"]
    return sha256


def verify(directory: Path, *, from_disk: bool = False) -> dict[str, Any]:
    """Return the `about` of the manifest after verifying every file.

    Args:
        from_disk: drop the files from the page cache before reading them, if the system supports it.

    Raises:
        CheckpointError: a file is missing, was changed, is not in the manifest, or is a link or another special file.
            The message names the first such file.
    """
    try:
        return _verified(directory, from_disk)
    except OSError as error:  # the disk failed, or another program removed the file
        raise CheckpointError(
            f"cannot read {quoted(error.filename or directory)}: {error.strerror or error}"
        ) from error


def recorded(directory: Path) -> frozenset[str]:
    """List the paths that a manifest records: its files, their directories, and the manifest itself.

    Directories end with a slash. The list is empty if the manifest is missing or was changed.
    """
    try:
        files = _read(directory)["files"]
    except CheckpointError:
        return frozenset()
    folders = {f"{folder.as_posix()}/" for name in files for folder in PurePosixPath(name).parents}
    return frozenset({MANIFEST, *files, *folders})


def _verified(directory: Path, from_disk: bool) -> dict[str, Any]:
    content = _read(directory)
    found = {path.relative_to(directory).as_posix(): path for path in _files(directory)}
    found.pop(MANIFEST)
    for name in {**content["files"], **found}:
        if name not in found:
            raise CheckpointError(f"{quoted(directory / name)} is missing")
        if name not in content["files"]:
            raise CheckpointError(f"{quoted(found[name])} is not in the manifest")
        expected, size = content["files"][name], found[name].stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{quoted(found[name])} has {size} bytes; its manifest records {expected['bytes']}")
    for name, path in found.items():
        if _sha256(path, from_disk) != content["files"][name]["sha256"]:
            raise CheckpointError(f"{quoted(path)} was changed after it was written")
    about: dict[str, Any] = content["about"]
    return about


def _read(directory: Path) -> dict[str, Any]:
    manifest = directory / MANIFEST
    if directory.is_symlink():
        raise CheckpointError(f"{quoted(directory)} is a link; a checkpoint must be a directory")
    try:
        written = read_small_file(manifest, _MOST_BYTES, CheckpointError)
        require_few_elements(written, quoted(manifest), CheckpointError, _MOST_ELEMENTS)
        content: dict[str, Any] = json.loads(written)
        del content["seal"]
        if {*content} != {"about", "files"} or not isinstance(content["about"], dict):
            raise ValueError
        if len(json.dumps(content["about"])) > _MOST_ABOUT_BYTES:
            raise CheckpointError(f"{quoted(manifest)} has more than {_MOST_ABOUT_BYTES} bytes in 'about'")
        if not all(_is_entry(name, entry) for name, entry in content["files"].items()) or written != _rendered(content):
            raise ValueError
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{quoted(directory)} has no manifest: its write did not complete") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {quoted(manifest)}: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{quoted(manifest)} was changed after it was written") from error
    return content


def _is_entry(name: str, entry: Any) -> bool:
    """Whether a name is a path inside the directory, and its entry has valid types and ranges."""
    return (
        len(name) <= _LONGEST_NAME
        and name.count("/") < _MOST_FOLDERS
        and not any(part in ("", ".", "..") for part in name.split("/"))
        and not any(character in name for character in "\0\\")
        and isinstance(entry, dict)
        and {field: type(value) for field, value in entry.items()} == _ENTRY
        and 0 <= entry["bytes"] < 2**63
        and bool(_SHA256.fullmatch(entry["sha256"]))
    )


def _files(directory: Path) -> Iterator[Path]:
    """Yield all files below `directory`, sorted by name. Raises for links, which may lead out of the directory."""
    for path in sorted(directory.rglob("*")):
        mode = os.lstat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise CheckpointError(f"{quoted(path)} is a link or a special file; a checkpoint has only regular files")
        if stat.S_ISREG(mode):
            yield path


def _sha256(path: Path, from_disk: bool = False) -> str:
    with open(path, "rb") as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rendered(content: Mapping[str, Any]) -> bytes:
    """Return the exact bytes of a manifest. Any other spelling is invalid.

    The result equals `json.dumps(..., indent=1)`. With `indent`, json uses a pure-Python encoder that takes a second
    per megabyte, so the entries of the files are formatted here instead.
    """
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    files = ",\n".join(
        f'  {json.dumps(name)}: {{\n   "bytes": {entry["bytes"]},\n   "sha256": {json.dumps(entry["sha256"])}\n  }}'
        for name, entry in content["files"].items()
    )
    frame = json.dumps({"about": content["about"], "files": {}, "seal": seal}, indent=1) + "\n"
    before, after = frame.rsplit('"files": {}', 1)
    return f'{before}"files": {{\n{files}\n }}{after}'.encode() if files else frame.encode()

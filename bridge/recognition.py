"""Find the checkpoint at a path.

A path may be a file, a directory that is one checkpoint, or a directory that contains checkpoint files. Several
checkpoints are an error. transformers' own files are an exception: they are forms of one model, and the first in
transformers' order is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from bridge.companions import has_companion
from bridge.errors import CheckpointError, bullet_list, quoted
from bridge.formats import FORMATS
from bridge.formats.directory import CONFIG


@dataclass(frozen=True)
class Found:
    """A checkpoint that a format recognises."""

    format: ModuleType
    path: Path
    """The argument for the format's `read`: a file, or a directory that is one checkpoint."""

    @property
    def model(self) -> object:
        """A key that all files with forms of the same model share."""
        return getattr(self.format, "FAMILY", self.path)


def find_checkpoints(path: Path) -> list[Found]:
    """Return all checkpoints at `path`, in the order of `FORMATS`. If a format reads `path` itself, only that one."""
    found: list[Found] = []
    try:
        for module in FORMATS.values():
            for file in module.find(path):
                if file == path:
                    return [Found(module, path)]
                found.append(Found(module, file))
    except OSError as error:
        raise CheckpointError(f"cannot read {quoted(path)}: {error.strerror}") from error
    return found


def choose_checkpoint(path: Path) -> tuple[Found, tuple[str, ...]] | None:
    """Return the checkpoint at `path` and a warning about unread forms of its model, or None if there is no checkpoint.

    Raises `CheckpointError` that lists the checkpoints if there are several.
    """
    found = find_checkpoints(path)
    if len({f.model for f in found}) > 1:
        listed = bullet_list(f"{f.format.NAME}: {quoted(f.path.name)}" for f in found)
        raise CheckpointError(
            f"{quoted(path)} holds several checkpoints:\n{listed}\n"
            f"give the file to read, for example: gpt2 inspect {quoted(found[0].path)}"
        )
    if not found:
        return None
    first, *others = found
    if not others:
        return first, ()
    names = ", ".join(quoted(f.path.name) for f in others)
    return first, (f"read from {quoted(first.path.name)}; the directory also holds {names}, which was not read",)


def own_config(file: Path) -> Path | None:
    """Return the `config.json` that describes `file`, or None if it may describe another checkpoint beside it."""
    config = file.parent / CONFIG
    is_alone = has_companion(file.parent, CONFIG) and {f.path for f in find_checkpoints(file.parent)} <= {file}
    return config if is_alone else None

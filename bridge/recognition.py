"""Which checkpoint a path stands for.

A path may be a file, a directory that is one checkpoint, or a directory that holds several. Several are an error,
except transformers' own files: they are forms of one model, and the first in transformers' order is read.
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
    """What the format's `read` takes: a file, or a directory that is a checkpoint as a whole."""

    @property
    def model(self) -> object:
        """Equal for the files that are forms of one model."""
        return getattr(self.format, "FAMILY", self.path)


def find_checkpoints(path: Path) -> list[Found]:
    """All checkpoints at `path`, in the order of `FORMATS`. A format that takes `path` itself is the only result."""
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
    """The checkpoint that `path` stands for, and a sentence on other forms of its model; None if there is none.

    Raises `CheckpointError` listing the checkpoints where `path` holds several.
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
    """The `config.json` beside `file` that describes it; None where it may describe another checkpoint there."""
    config = file.parent / CONFIG
    is_alone = has_companion(file.parent, CONFIG) and {f.path for f in find_checkpoints(file.parent)} <= {file}
    return config if is_alone else None

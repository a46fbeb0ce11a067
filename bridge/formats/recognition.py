"""Find the checkpoint at a path.

A path may be a file, a directory that is one checkpoint, or a directory that contains checkpoint files. Several
checkpoints are an error. transformers' own files are an exception: they are forms of one model, and the first in
transformers' order is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from bridge.adapters.peft_config import FILE as ADAPTER_CONFIG
from bridge.errors import CheckpointError, bullet_list, quoted
from bridge.formats import FORMATS
from bridge.formats.directory import CONFIG
from bridge.formats.format import Format
from bridge.formats.peft import WEIGHTS
from bridge.storage.companions import has_companion, stays_inside
from bridge.storage.stored_file import StoredFile

_MOST_ENTRIES = 1000
"""Entries of a directory that `why_unrecognised` looks at."""


class SeveralCheckpointsError(CheckpointError):
    """A directory holds several checkpoints."""


@dataclass(frozen=True)
class Found:
    """A checkpoint that a format recognises."""

    format: Format
    path: Path
    """The argument for the format's `read`: a file, or a directory that is one checkpoint."""

    @property
    def model(self) -> object:
        """A key that is equal for files that are forms of the same model."""
        return self.format.family or self.path


def find_checkpoints(path: Path) -> list[Found]:
    """Return all checkpoints in a directory, in the order of `FORMATS`. For a file, return only the first match."""
    try:
        found = [Found(format, file) for format in FORMATS.values() for file in format.find(path)]
    except OSError as error:
        raise CheckpointError(f"cannot read {quoted(path)}: {error.strerror}") from error
    return found if path.is_dir() else found[:1]


def choose_checkpoint(path: Path) -> tuple[Found, tuple[str, ...]] | None:
    """Return the checkpoint at `path` and a warning about unread forms of its model, or None if there is no checkpoint.

    Raises a `SeveralCheckpointsError` that lists the checkpoints if there are several.
    """
    found = find_checkpoints(path)
    if len({f.model for f in found}) > 1:
        listed = bullet_list(f"{f.format.name}: {quoted(f.path.name)}" for f in found)
        raise SeveralCheckpointsError(
            f"{quoted(path)} holds several checkpoints:\n{listed}\n"
            f"give the file to read, for example: gpt2 inspect {quoted(next(f.path for f in found if f.path != path))}"
        )
    if not found:
        return None
    first, *others = found
    if first.path.parent == path and not stays_inside(path, first.path.name):
        raise CheckpointError(
            f"{quoted(first.path)} is a link out of the checkpoint's directory; give the file itself, or "
            "replace the link with a copy"
        )
    if not others:
        return first, ()
    names = ", ".join(quoted(f.path.name) for f in others)
    return first, (f"read from {quoted(first.path.name)}; the directory also holds {names}, which was not read",)


def own_config(file: Path) -> Path | None:
    """Return the `config.json` that describes `file`, or None if it may describe another checkpoint beside it."""
    config = file.parent / CONFIG
    is_alone = has_companion(file.parent, CONFIG) and {f.path for f in find_checkpoints(file.parent)} <= {file}
    return config if is_alone else None


def why_unrecognised(path: Path) -> str:
    """Return why `choose_checkpoint` found nothing at `path`, and what to do."""
    if not path.is_dir():
        if not StoredFile.open(path).size:  # raises if it is not a regular file
            return "it is empty"
        return "its first bytes match no supported format; the download may be damaged, or it is not a checkpoint"
    adapter = [name for name in WEIGHTS if has_companion(path, name)]
    if has_companion(path, ADAPTER_CONFIG) or adapter:
        lacks = ADAPTER_CONFIG if adapter else " or ".join(WEIGHTS)
        return f"it has {' and '.join(adapter) or ADAPTER_CONFIG}, but no {lacks}; copy it from the adapter's source"
    found = {entry: find_checkpoints(entry) for entry in sorted(islice(path.iterdir(), _MOST_ENTRIES))}
    directories = [entry for entry, inside in found.items() if inside and entry.is_dir()]
    # Files whose format needs a config.json beside them. Others would have been recognised in the directory.
    files = [
        entry for entry, inside in found.items() if not entry.is_dir() and any(f.format.weight_files for f in inside)
    ]
    if files and not has_companion(path, CONFIG):
        return f"it has {_named(files)}, but no {CONFIG}; copy the model's {CONFIG} beside the weights"
    if files:
        return f"it has {_named(files)}, which are not names of weights; give a file, for example {quoted(files[0])}"
    if directories:
        return f"it holds the checkpoints {_named(directories)}; give one of them, for example {quoted(directories[0])}"
    return (
        "it has neither config.json with weights beside it (model.safetensors, pytorch_model.bin, "
        "flax_model.safetensors, flax_model.msgpack), nor hparams.json with a TensorFlow checkpoint, nor a file "
        "in another supported format (nanoGPT's .pt, llm.c's .bin, .gguf), nor adapter_config.json with "
        "adapter_model.safetensors or adapter_model.bin"
    )


def _named(paths: list[Path]) -> str:
    names = ", ".join(quoted(p.name) for p in paths[:5])
    return names if len(paths) <= 5 else f"{names} and {len(paths) - 5} more"

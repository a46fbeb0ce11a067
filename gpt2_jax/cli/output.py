"""What the verbs share: progress bars, JSON files, and the message for a missing extra."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from bridge import BridgeError, Checkpoint
from bridge.arrays import LazyTensors, TensorEntry
from bridge.errors import install_command
from gpt2_jax.terminal import Console


def progress(*columns: ProgressColumn) -> Progress:
    """A bar on standard error, and only where a person is watching."""
    watched = Console(stderr=True)
    return Progress(*columns, console=watched, transient=True, disable=not watched.is_terminal)


@contextmanager
def reading_bar(checkpoint: Checkpoint, doing: str, times: int = 1) -> Iterator[Checkpoint]:
    """The same checkpoint, with a bar on standard error that moves as its tensors are read, each so many times."""
    entries = checkpoint.tensors.entries
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with progress(*columns) as bar:
        task = bar.add_task(doing, total=times * sum(entry.nbytes for entry in entries.values()))

        def watched(entry: TensorEntry) -> TensorEntry:
            def read() -> np.ndarray:
                array = entry.read()
                bar.advance(task, entry.nbytes)
                return array

            return replace(entry, read=read)

        yield replace(checkpoint, tensors=LazyTensors({name: watched(entry) for name, entry in entries.items()}))


def json_writer(file: Path | None) -> Callable[[dict[str, Any]], None]:
    """What writes `--json FILE`, or nothing where it was not given.

    Made before the work begins, so that a file that cannot be written is found before and not after.
    """
    if file is not None:
        require_writable(file)

    def write(value: dict[str, Any]) -> None:
        if file is not None:
            try:
                file.write_text(json.dumps(_strict(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
            except OSError as error:
                raise BridgeError(f"cannot write {file}: {error.strerror}") from error

    return write


def require_writable(file: Path) -> None:
    """Raise the message that a name gets to which no file can be written."""
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise BridgeError(f"cannot write {file}; give a file in a directory that exists and can be written to")


def _strict(value: Any) -> Any:
    """The same with numbers that JSON does not have, as a checkpoint's own fields may be, spelled as strings."""
    if isinstance(value, dict):
        return {name: _strict(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def require_torch(what: str) -> None:
    """Raise the message that a newcomer needs, before an import error does."""
    if importlib.util.find_spec("torch") is None:
        raise BridgeError(f"{what} needs PyTorch; install it, or this package's extra: {install_command('torch')}")

"""Output shared by the verbs: progress bars, report files, and the message for a missing extra."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bridge import BridgeError, Checkpoint
from bridge.errors import install_command
from bridge.storage.tensors import LazyTensor, LazyTensorMap
from gpt2_jax.console.report_files import (
    require_html_path,
    require_report_path,
    write_html_report,
    write_json_lines,
    write_json_report,
)
from gpt2_jax.console.terminal import Console


def progress(*columns: ProgressColumn) -> Progress:
    """A progress bar on standard error, shown only on a terminal that can move its cursor."""
    watched = Console(stderr=True)
    return Progress(*columns, console=watched, transient=True, disable=not watched.is_interactive)


@contextmanager
def status_bar() -> Iterator[Callable[[str], None]]:
    """A progress bar for work of unknown length. Yields a function that sets its text."""
    with progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task("", total=None)
        yield lambda text: bar.update(task, description=text)


@contextmanager
def reading_bar(checkpoint: Checkpoint, doing: str, times: int = 1) -> Iterator[Checkpoint]:
    """Yield a checkpoint that advances a progress bar whenever a tensor is read. Each is read `times` times."""
    entries = checkpoint.tensors.entries
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with progress(*columns) as bar:
        task = bar.add_task(doing, total=times * sum(entry.nbytes for entry in entries.values()))

        def watched(entry: LazyTensor) -> LazyTensor:
            def read() -> np.ndarray:
                array = entry.read()
                bar.advance(task, entry.nbytes)
                return array

            return replace(entry, read=read)

        yield replace(checkpoint, tensors=LazyTensorMap({name: watched(entry) for name, entry in entries.items()}))


def json_writer(
    file: Path | None, overwrite: bool = False, inputs: Iterable[str | Path | None] = ()
) -> Callable[[dict[str, Any]], None]:
    """Return a function that writes `--json FILE`, or does nothing without `--json`.

    Call it before the work starts: it raises if the file cannot be written or may not be replaced.

    Args:
        overwrite: an earlier report may be replaced.
        inputs: files and directories that the command reads.
    """
    if file is None:
        return lambda value: None
    require_report_path(file, overwrite=overwrite, inputs=inputs)
    return lambda value: write_json_report(file, value, overwrite=overwrite)


def json_lines_writer(
    file: Path | None, overwrite: bool = False, inputs: Iterable[str | Path | None] = ()
) -> Callable[[Iterable[Mapping[str, Any]]], None]:
    """Return a function that writes records as JSON lines, or does nothing without a file. Raises as `json_writer`."""
    if file is None:
        return lambda records: None
    require_report_path(file, overwrite=overwrite, inputs=inputs)
    return lambda records: write_json_lines(file, records, overwrite=overwrite)


class Reportable(Protocol):
    """A result with both kinds of reports."""

    def to_json(self) -> dict[str, Any]: ...
    def to_html(self) -> str: ...


def report_writer(
    json: Path | None, html: Path | None, overwrite: bool = False, inputs: Iterable[str | Path | None] = ()
) -> Callable[[Reportable], None]:
    """Return a function that writes `--json FILE` and `--html FILE`, those that are given.

    Call it before the work starts, like `json_writer`.
    """
    inputs = [*inputs]
    write_json = json_writer(json, overwrite, inputs)
    if html is not None:
        require_html_path(html, overwrite=overwrite, inputs=inputs, json=json)

    def write(result: Reportable) -> None:
        if json is not None:
            write_json(result.to_json())
        if html is not None:
            write_html_report(html, result.to_html(), overwrite=overwrite)

    return write


def require_torch(what: str) -> None:
    """Raise an error with installation instructions if PyTorch is missing."""
    if importlib.util.find_spec("torch") is None:
        raise BridgeError(f"{what} needs PyTorch; install it, or this package's extra: {install_command('torch')}")

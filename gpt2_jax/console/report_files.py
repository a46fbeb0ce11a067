"""Report files of commands: JSON, JSON lines, HTML pages and plots.

Every report names its generator, so that a later command can recognise it. Only reports are overwritten.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge import BridgeError, __version__
from bridge.errors import quoted
from bridge.storage.atomic_writes import new_file
from gpt2_jax.reporting.markup import GENERATOR, HTML_START

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOT_FORMATS = (".png", ".svg", ".pdf")
_METADATA_FIELD = {".png": "Software", ".svg": "Creator", ".pdf": "Creator"}
HTML_SUFFIXES = (".html", ".htm")
_STARTS = (
    f'{{\n  "generator": "{GENERATOR} '.encode(),
    f'{{"generator": "{GENERATOR} '.encode(),
    HTML_START.encode(),
)
"""How JSON reports, JSON lines and HTML pages begin."""
_MAX_PLOT_BYTES = 2**24
_GENERATED = {
    ".png": re.compile(rb"tEXtSoftware\0gpt2-bridge(?![-\w])"),
    ".svg": re.compile(rb"<dc:creator>\s*<cc:Agent>\s*<dc:title>gpt2-bridge</dc:title>"),
    ".pdf": re.compile(rb"/Creator \(gpt2-bridge\)"),
}
"""Where each format keeps the metadata that `save_plot` writes."""


def require_report_path(
    path: Path,
    *,
    overwrite: bool,
    inputs: Iterable[str | Path | None] = (),
    kind: str = "report",
    is_own: Callable[[Path], bool] | None = None,
) -> None:
    """Raise `BridgeError` unless a report can be written to `path`. Call it before the work starts.

    Args:
        path: the value of `--json`, `--plot` or another flag.
        overwrite: an earlier report may be replaced.
        inputs: files and directories that the command reads.
        kind: what the messages call the file.
        is_own: whether an existing file is of this kind. The default is `is_report`.
    """
    for source in inputs:
        if source is not None and path.exists() and os.path.exists(source) and path.samefile(source):
            raise BridgeError(f"{quoted(path)} is read by this command; choose another file for its {kind}")
    is_link_to_nothing = path.is_symlink() and not path.exists()
    if path.is_dir() or is_link_to_nothing or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise BridgeError(f"cannot write {quoted(path)}; give a file in a directory that exists and can be written to")
    if path.exists() and not overwrite:
        raise BridgeError(f"{quoted(path)} exists; choose another name, or replace an earlier {kind} with --overwrite")
    if path.exists() and not (is_own or is_report)(path):
        raise BridgeError(f"{quoted(path)} is not a {kind} of this command and was not replaced; choose another name")


def require_different_files(files: Mapping[str, Path | None]) -> None:
    """Raise `BridgeError` if two flags name the same file. `files`: flag -> its value."""
    flags: dict[Path, str] = {}
    for flag, path in files.items():
        if path is not None and (other := flags.setdefault(path.resolve(), flag)) != flag:
            raise BridgeError(f"{other} and {flag} both name {quoted(path)}; give two files")


def require_plot_path(path: Path, *, overwrite: bool, json: Path | None = None) -> None:
    """Like `require_report_path`, for a plot. Its name must end in one of `PLOT_FORMATS`.

    `json`: the report of the same command, which must be another file.
    """
    if json is not None and path.resolve() == json.resolve():
        raise BridgeError(f"--plot and --json both name {quoted(path)}; give two files")
    if path.suffix not in PLOT_FORMATS:
        raise BridgeError(f"--plot {quoted(path)}: the name must end in {', '.join(PLOT_FORMATS)}")
    require_report_path(path, overwrite=overwrite)


def require_html_path(
    path: Path, *, overwrite: bool, inputs: Iterable[str | Path | None] = (), json: Path | None = None
) -> None:
    """Like `require_report_path`, for an HTML page. Its name must end in one of `HTML_SUFFIXES`.

    `json`: the report of the same command, which must be another file.
    """
    if json is not None and path.resolve() == json.resolve():
        raise BridgeError(f"--html and --json both name {quoted(path)}; give two files")
    if path.suffix not in HTML_SUFFIXES:
        raise BridgeError(f"--html {quoted(path)}: the name must end in {' or '.join(HTML_SUFFIXES)}")
    require_report_path(path, overwrite=overwrite, inputs=inputs)


def write_json_report(path: Path, value: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Write `value` as JSON with its generator. NaN and infinity, which JSON lacks, are written as strings."""
    content = {"generator": f"{GENERATOR} {__version__}", **value}
    text = json.dumps(_json_compatible(content), indent=2, allow_nan=False) + "\n"
    with new_file(path, overwrite=lambda: overwrite and is_report(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_lines(path: Path, records: Iterable[Mapping[str, Any]], *, overwrite: bool = False) -> None:
    """Write each record as a line of JSON. The first one also names the generator. Raises for NaN and infinity."""
    with (
        new_file(path, overwrite=lambda: overwrite and is_report(path)) as temporary,
        temporary.open("w", encoding="utf-8") as file,
    ):
        generator = {"generator": f"{GENERATOR} {__version__}"}
        for record in records:
            file.write(json.dumps({**generator, **record}, allow_nan=False) + "\n")
            generator = {}


def write_html_report(path: Path, page: str, *, overwrite: bool = False) -> None:
    """Write an HTML page, which names its generator."""
    with new_file(path, overwrite=lambda: overwrite and is_report(path)) as temporary:
        temporary.write_text(page, encoding="utf-8")


def save_plot(figure: Figure, path: Path, *, overwrite: bool = False, dpi: int = 150) -> None:
    """Write a figure in the format of the path's suffix, with its generator in the metadata."""
    with new_file(path, overwrite=lambda: overwrite and is_report(path)) as temporary:
        metadata = {_METADATA_FIELD[path.suffix]: GENERATOR}
        figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=dpi, metadata=metadata)


def is_report(path: Path) -> bool:
    """Whether a file is a report, a page or a plot of this project, by its generator."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            start = file.read(max(map(len, _STARTS)))
            if start.startswith(_STARTS):
                return True
            pattern = _GENERATED.get(path.suffix)
            return pattern is not None and pattern.search(start + file.read(_MAX_PLOT_BYTES)) is not None
    except OSError:
        return False


def _json_compatible(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _json_compatible(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_compatible(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

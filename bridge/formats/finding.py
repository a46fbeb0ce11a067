"""Which files of a directory a format reads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from bridge.companions import has_companion
from bridge.errors import CheckpointError, quoted
from bridge.formats.directory import CONFIG


def files_by_content(path: Path, suffixes: Collection[str], recognised: Callable[[Path], bool]) -> list[Path]:
    """The file `path`, or the files with one of the `suffixes` in the directory `path`, that are `recognised`."""
    if path.is_dir():
        return [p for p in sorted(path.iterdir()) if p.suffix in suffixes and p.is_file() and recognised(p)]
    return [path] if path.is_file() and recognised(path) else []


def files_beside_config(directory: Path, names: Iterable[str]) -> list[Path]:
    """Those of the files `names` that a directory with a `config.json` holds, in the order of `names`."""
    if not has_companion(directory, CONFIG):
        return []
    return [directory / name for name in names if (directory / name).is_file()]


def config_beside(weights: Path) -> Path:
    """The `config.json` in the directory of `weights`, which do not say what they compute."""
    config = weights.parent / CONFIG
    if not has_companion(weights.parent, CONFIG):
        raise CheckpointError(
            f"{quoted(weights)} holds tensors, but there is no {CONFIG} beside it; add the model's {CONFIG}, because "
            "the tensors do not say what they compute"
        )
    return config

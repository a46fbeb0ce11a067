"""Find the files of a directory that a format reads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from bridge.errors import CheckpointError, quoted
from bridge.formats.directory import CONFIG
from bridge.storage.companions import has_companion


def files_by_content(path: Path, suffixes: Collection[str], recognised: Callable[[Path], bool]) -> list[Path]:
    """Return `path` if it is a `recognised` file, or the recognised files with a suffix in the directory `path`."""
    if path.is_dir():
        return [p for p in sorted(path.iterdir()) if p.suffix in suffixes and p.is_file() and recognised(p)]
    return [path] if path.is_file() and recognised(path) else []


def files_beside_config(directory: Path, names: Iterable[str]) -> list[Path]:
    """Return the files in `names` that exist in a directory with a `config.json`, in the order of `names`."""
    if not has_companion(directory, CONFIG):
        return []
    return [directory / name for name in names if (directory / name).is_file()]


def config_beside(weights: Path) -> Path:
    """Return the `config.json` beside `weights`. The weights alone do not determine the model."""
    config = weights.parent / CONFIG
    if not has_companion(weights.parent, CONFIG):
        raise CheckpointError(
            f"{quoted(weights)} holds tensors, but there is no {CONFIG} beside it; add the model's {CONFIG}, because "
            "the tensors alone do not determine the model"
        )
    return config

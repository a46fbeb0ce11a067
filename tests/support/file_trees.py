"""Files and directories for the tests of writing."""

from __future__ import annotations

from pathlib import Path

from bridge.storage.atomic_writes import Replaceable, new_directory
from bridge.storage.hidden_directories import MARKER


def tree(path: Path) -> dict[str, bytes | None]:
    """Everything under `path`, hidden files too."""
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


def fill(path: Path, replaceable: Replaceable | None = None) -> None:
    with new_directory(path, replaceable=replaceable) as directory:
        (directory / "new").write_text("new")


def make_hidden_directory(path: Path) -> Path:
    """A hidden directory as this project makes it."""
    path.mkdir(exist_ok=True)
    (path / MARKER).touch()
    return path


def own(name: str) -> bool:
    """The files that these tests' writers may replace."""
    return name in ("old", "new")

"""Files and directories for the tests of writing."""

from __future__ import annotations

from pathlib import Path

from bridge.storage.atomic_writes import Replaceable, new_directory
from bridge.storage.hidden_directories import MARKER


def tree(path: Path) -> dict[str, bytes | None]:
    """Return path -> content of everything below `path`, including hidden files. The content of a directory is None."""
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


def fill(path: Path, replaceable: Replaceable | None = None) -> None:
    with new_directory(path, replaceable=replaceable) as directory:
        (directory / "new").write_text("new")


def make_hidden_directory(path: Path) -> Path:
    """Make a hidden directory of this project."""
    path.mkdir(exist_ok=True)
    (path / MARKER).touch()
    return path


def own(name: str) -> bool:
    """Whether a writer in these tests may replace the file."""
    return name in ("old", "new")

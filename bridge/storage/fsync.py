"""Flush files and directories to the disk."""

from __future__ import annotations

import os
from pathlib import Path


def flush_to_disk(path: Path) -> None:
    """fsync a file or a directory. Windows cannot open directories, so they are skipped there."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows needs write access to flush
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(directory: Path) -> None:
    for path in (directory, *directory.rglob("*")):
        flush_to_disk(path)

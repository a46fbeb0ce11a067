"""Token files of every kind, like those of their authors' programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def nanogpt(path: Path, ids: Sequence[int] | np.ndarray) -> Path:
    """Write the bytes of the array, as nanoGPT's data/*/prepare.py does."""
    np.asarray(ids, "<u2").tofile(path)
    return path


def llmc(path: Path, ids: Sequence[int] | np.ndarray, magic: int = 20240520, version: int = 1) -> Path:
    """Write 256 int32 and the ids, as llm.c's dev/data/data_common.py does."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    dtype = "<u4" if magic == 20240801 else "<u2"
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype).tobytes())
    return path


def npy(path: Path, ids: Sequence[int] | np.ndarray, dtype: str = "<u2") -> Path:
    np.save(path, np.asarray(ids, dtype))
    return path

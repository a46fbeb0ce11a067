"""Token files of every kind, written as by their authors' programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def nanogpt(path: Path, ids: Sequence[int] | np.ndarray) -> Path:
    """data/*/prepare.py of nanoGPT: the bytes of the array."""
    np.asarray(ids, "<u2").tofile(path)
    return path


def llmc(path: Path, ids: Sequence[int] | np.ndarray, magic: int = 20240520, version: int = 1) -> Path:
    """dev/data/data_common.py of llm.c: 256 int32, then the ids."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    dtype = "<u4" if magic == 20240801 else "<u2"
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype).tobytes())
    return path


def npy(path: Path, ids: Sequence[int] | np.ndarray, dtype: str = "<u2") -> Path:
    np.save(path, np.asarray(ids, dtype))
    return path

"""Data sets of the Hugging Face hub, which the package `datasets` downloads and stores as Arrow files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.errors import install_command, quoted
from gpt2_jax.data.errors import DataError
from gpt2_jax.data.text.documents import Documents, in_order

_VALIDATION = ("validation", "test")
"""The splits that are used for validation, in order of preference."""


def find_splits(source: str) -> tuple[Documents, Documents | None]:
    """Return the files for training and for validation; the second is None if there is no such split.

    Args:
        source: OWNER/NAME or OWNER/NAME:CONFIGURATION.

    Raises:
        DataError: `datasets` is not installed, the download failed, or the data set has no split `train`.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{quoted(source)} does not exist; give a file, a directory or a glob; to load it as a data set of the "
            f"Hugging Face hub, install an extra: {install_command('datasets')}"
        ) from None
    name, _, configuration = source.partition(":")
    try:
        loaded: Mapping[str, Any] = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # also errors of its HTTP library and of the system
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{quoted(source)} is not a local path, and `datasets` cannot load it from the Hugging Face hub "
            f"({type(error).__name__}: {quoted(reason, limit=200)[1:-1]}); check the name and the connection"
        ) from error
    if "train" not in loaded:
        raise DataError(f"{quoted(source)} has no split 'train', but {', '.join(map(quoted, loaded))}")
    held_out = next((split for split in _VALIDATION if split in loaded), None)
    return _files(source, loaded["train"]), None if held_out is None else _files(source, loaded[held_out])


def _files(source: str, split: Any) -> Documents:
    """Return the Arrow files of a split."""
    paths = [Path(entry["filename"]) for entry in split.cache_files]
    if not paths:
        raise DataError(f"{quoted(source)} is not stored in Arrow files; save it with `save_to_disk`, and give that")
    return in_order(source, paths[0].parent, paths)

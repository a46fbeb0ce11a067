"""Directories that `datasets` writes with `save_to_disk`: one data set, or a `DatasetDict` with several splits.

Source: `Dataset.load_from_disk` and `DatasetDict.load_from_disk` of datasets 4, whose layout this module follows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bridge.errors import quoted
from bridge.storage.json_text import parse_object
from bridge.storage.regular_file import read_small_file
from gpt2_jax.data.errors import DataError
from gpt2_jax.data.text.documents import Documents, in_order

_DICT, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"
_MOST_BYTES = 2**22
_VALIDATION = ("validation", "test")
"""The splits that are used for validation: the first one that is there."""


def is_saved_dataset(path: Path) -> bool:
    """Whether a path is a directory that `save_to_disk` wrote."""
    return (path / _DICT).is_file() or ((path / _STATE).is_file() and (path / _INFO).is_file())


def find_splits(directory: Path) -> tuple[Documents, Documents | None]:
    """Return the files for training and for validation; the second is None if there is no such split.

    Raises:
        DataError: a description is damaged, a file is missing, or a `DatasetDict` has no split `train`.
    """
    directory = directory.absolute()
    if not (directory / _DICT).is_file():
        return _files(directory), None
    splits = _read(directory / _DICT).get("splits")
    if not isinstance(splits, list) or not all(_is_plain_name(name) for name in splits):
        raise DataError(f"{quoted(directory / _DICT)} does not list splits; save the data set again")
    if "train" not in splits:
        raise DataError(
            f"{quoted(directory)} has no split 'train', but {', '.join(map(quoted, splits))}; give the directory of "
            "one of them"
        )
    held_out = next((name for name in _VALIDATION if name in splits), None)
    return _files(directory / "train"), None if held_out is None else _files(directory / held_out)


def _files(directory: Path) -> Documents:
    state = _read(directory / _STATE)
    if state.get("_indices_data_files"):
        raise DataError(f"{quoted(directory)} has separate indices, of an early version of datasets; save it again")
    names = _file_names(state.get("_data_files"))
    if not names:
        raise DataError(f"{quoted(directory / _STATE)} does not list data files; save the data set again")
    return in_order(directory, directory, [directory / name for name in names])


def _file_names(listed: Any) -> list[str]:
    """Return the names in the list of files of a state.json, or none if the list is not valid."""
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        return []
    names = [entry.get("filename") for entry in listed]
    return names if all(map(_is_plain_name, names)) else []


def _read(path: Path) -> dict[str, Any]:
    try:
        return parse_object(read_small_file(path, _MOST_BYTES, DataError), quoted(path), DataError)
    except OSError as error:
        raise DataError(f"cannot read {quoted(path)}: {error.strerror}; save the data set again") from error


def _is_plain_name(name: object) -> bool:
    """Whether a name from a file names something in the same directory."""
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name and "\0" not in name

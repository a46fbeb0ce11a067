"""Files that describe a mixture: several sources of data, each with a weight.

[books]
path = "books/*.txt.gz"
weight = 0.7

[chats]
path = "chats.jsonl"
weight = 0.3
messages_field = "conversation"
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.errors import escaped, quoted
from bridge.storage.regular_file import read_small_file
from gpt2_jax.data.errors import DataError
from gpt2_jax.data.file_kinds import is_dataset_id, is_mixture_file
from gpt2_jax.data.records.schema import RecordOptions
from gpt2_jax.data.text.documents import STDLIB

_FIELDS = ("text_field", "prompt_field", "completion_field", "messages_field")
_NAME = re.compile(r"[A-Za-z][\w.-]{0,39}", re.ASCII)
_NO_OPTIONS = RecordOptions()
_MAX_BYTES = 2**20
_MAX_SOURCES = 256
_WEIGHTS = (1e-100, 1e100)


@dataclass(frozen=True)
class MixtureSource:
    """One source of a mixture."""

    name: str
    path: str
    """A source for `open_data`. In the file, paths are relative to the directory of the file."""
    weight: float
    records: RecordOptions


def read_mixture(path: str | Path, options: RecordOptions = _NO_OPTIONS) -> tuple[MixtureSource, ...]:
    """Return the sources that a file describes, in the order of the file.

    Args:
        options: options of all records. Each source names its own fields.

    Raises:
        DataError: the file is not TOML, or one of its tables is not a source.
    """
    where = quoted(Path(path))
    if options.named():
        raise DataError(f"{where} is a mixture; name the fields of each source in it, not with flags")
    try:
        tables = tomllib.loads(read_small_file(Path(path), _MAX_BYTES, DataError).decode())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and TOMLDecodeError are ValueErrors
        raise DataError(f"{where} is not a TOML file: {escaped(str(error), keep='')}") from None
    except OSError as error:
        raise DataError(f"cannot read {where}: {error.strerror}") from error
    if not 1 <= len(tables) <= _MAX_SOURCES:
        raise DataError(f"{where} has {len(tables)} tables; give one for each source, at most {_MAX_SOURCES}")
    directory = Path(path).absolute().parent
    return tuple(
        _source(f"{where}, [{quoted(name)[1:-1]}]", name, table, directory, options) for name, table in tables.items()
    )


def _source(where: str, name: str, table: Any, directory: Path, options: RecordOptions) -> MixtureSource:
    if not _NAME.fullmatch(name):
        raise DataError(f"{where}: names of sources have letters, digits, '_', '.' and '-', at most 40, a letter first")
    if not isinstance(table, Mapping):
        raise DataError(f"{where} is not a table with path and weight")
    if unknown := table.keys() - {"path", "weight", *_FIELDS}:
        known = ", ".join(("path", "weight", *_FIELDS))
        raise DataError(f"{where} has the key {quoted(min(unknown))}; the keys of a source are {known}")
    path, weight = table.get("path"), table.get("weight", 0)
    texts = {key: table[key] for key in ("path", *_FIELDS) if key in table}
    if not isinstance(path, str) or not path:
        raise DataError(f"{where} has no path")
    if wrong := [key for key, value in texts.items() if not isinstance(value, str)]:
        raise DataError(f"{where}: {wrong[0]} must be a string")
    if type(weight) not in (int, float) or not _WEIGHTS[0] <= weight <= _WEIGHTS[1]:
        raise DataError(f"{where}: weight must be a number above 0, from {_WEIGHTS[0]:g} to {_WEIGHTS[1]:g}")
    is_local = path != STDLIB and ((directory / path).parent.is_dir() or not is_dataset_id(path))
    source = str(directory / path) if is_local else path
    if is_mixture_file(source):
        raise DataError(f"{where}: {quoted(Path(path))} is a mixture itself; list its sources here")
    fields = {key: value for key, value in texts.items() if key != "path"}
    return MixtureSource(name, source, float(weight), dataclasses.replace(options, **fields))

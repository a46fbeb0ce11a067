"""Records in Parquet and Arrow files, read with pyarrow in batches of rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from bridge.errors import quoted
from bridge.storage.regular_file import open_regular_file
from gpt2_jax.data.compression import import_pyarrow, require_bounded
from gpt2_jax.data.errors import DataError
from gpt2_jax.data.file_kinds import RecordFormat, compression_of
from gpt2_jax.data.records.rows import Row, require_distinct
from gpt2_jax.data.records.schema import Kind

_ROWS = 128
"""Rows of a Parquet file that are in memory at a time."""
_MOST_METADATA_BYTES, _MOST_COLUMNS = 2**24, 2**20
_ARROW_FILE = b"ARROW1"


def columns_of(path: Path, format: RecordFormat) -> list[str]:
    """Return the names of the columns. Raises `DataError` if the file is damaged."""
    with _opened(path, format) as table:
        require_distinct(table.schema.names, quoted(path))
        return list(table.schema.names)


def rows(path: Path, format: RecordFormat, kind: Kind, fields: Sequence[str]) -> Iterator[Row]:
    """Yield the rows with these fields.

    Raises `DataError` if the file is damaged, or if a column does not have the type that `kind` needs.
    """
    with _opened(path, format) as table:
        require_distinct(table.schema.names, quoted(path))
        for name in fields:
            _require_type(table.schema.field(name).type, name, kind, path)
        number = produced = 0
        for batch in table.batches(fields):
            columns = [_decoded(batch.column(name)) for name in fields]
            produced += sum(column.nbytes for column in columns)
            require_bounded(path, table.size, produced)
            for values in zip(*(column.to_pylist() for column in columns), strict=True):
                number += 1
                yield Row("record", number, dict(zip(fields, values, strict=True)), table.file.tell())


@dataclass(frozen=True)
class _Table:
    file: BinaryIO
    size: int
    schema: Any
    batches: Callable[[Sequence[str]], Iterable[Any]]
    """Returns batches of at most `_ROWS` rows that have the given columns."""


@contextmanager
def _opened(path: Path, format: RecordFormat) -> Iterator[_Table]:
    name = "Parquet" if format == "parquet" else "Arrow"
    pyarrow = import_pyarrow(f"{quoted(path)}: {name}")
    if compression_of(path):
        raise DataError(f"{quoted(path)}: files of {name} are compressed inside; decompress this one")
    try:
        with open_regular_file(path, DataError) as file:
            yield (_parquet if format == "parquet" else _arrow)(pyarrow, file)
    except (pyarrow.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        raise DataError(
            f"{quoted(path)} cannot be read as {name}: {quoted(error, 200)}; copy or write it again"
        ) from None


class _Bounded:
    """A file that never reads more bytes than it has, because pyarrow trusts the lengths in a file."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, os.fstat(file.fileno()).st_size
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        rest = max(0, self._size - self._file.tell())
        return self._file.read(rest if size < 0 else min(size, rest))

    def close(self) -> None:
        pass  # whoever opened the file closes it


def _parquet(pyarrow: Any, file: BinaryIO) -> _Table:
    from pyarrow import parquet

    opened = parquet.ParquetFile(
        pyarrow.PythonFile(_Bounded(file), mode="r"),
        pre_buffer=False,
        buffer_size=2**20,  # reads pages one by one instead of whole columns
        thrift_string_size_limit=_MOST_METADATA_BYTES,
        thrift_container_size_limit=_MOST_COLUMNS,
    )

    def batches(fields: Sequence[str]) -> Iterable[Any]:
        return opened.iter_batches(_ROWS, columns=list(fields), use_threads=False)

    return _Table(file, os.fstat(file.fileno()).st_size, opened.schema_arrow, batches)


def _arrow(pyarrow: Any, file: BufferedReader) -> _Table:
    """Open either form of Arrow's format: a file with an index at its end, or a stream, which `datasets` writes."""
    from pyarrow import ipc

    is_file = file.peek(len(_ARROW_FILE)).startswith(_ARROW_FILE)
    reader = (ipc.open_file if is_file else ipc.open_stream)(pyarrow.PythonFile(_Bounded(file), mode="r"))

    def batches(fields: Sequence[str]) -> Iterable[Any]:
        for batch in (reader.get_batch(k) for k in range(reader.num_record_batches)) if is_file else reader:
            batch.validate(full=True)  # the offsets in a file are not trusted
            yield from (batch.slice(start, _ROWS) for start in range(0, batch.num_rows, _ROWS))

    return _Table(file, os.fstat(file.fileno()).st_size, reader.schema, batches)


def _decoded(column: Any) -> Any:
    from pyarrow import types

    return column.dictionary_decode() if types.is_dictionary(column.type) else column


def _require_type(found: Any, name: str, kind: Kind, path: Path) -> None:
    """Raise `DataError` unless a column has text or, for messages, lists of structs."""
    from pyarrow import types

    if kind == "messages":
        is_list = types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found)
        if not (is_list and types.is_struct(found.value_type)):
            raise DataError(
                f"{quoted(path)}: the column {quoted(name)} is {quoted(found)}; messages are a list of structs with "
                "role and content"
            )
        return
    plain = found.value_type if types.is_dictionary(found) else found
    if not (types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain)):
        nested = "; nested columns are not read" if types.is_nested(plain) else ""
        raise DataError(f"{quoted(path)}: the column {quoted(name)} is {quoted(found)} and not text{nested}")

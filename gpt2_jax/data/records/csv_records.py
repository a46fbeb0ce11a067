"""Records in CSV and TSV: the first line names the columns."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bridge.errors import quoted
from gpt2_jax.data.compression import Stream
from gpt2_jax.data.errors import DataError
from gpt2_jax.data.records.rows import MOST_ROW_BYTES, BadRecord, Row, lines, place, raise_too_long, require_distinct

_DIALECTS = {"csv": "excel", "tsv": "excel-tab"}


def header(path: Path, stream: Stream, kind: str) -> list[str]:
    """Return the names of the columns. Raises `DataError` if there are none or if one occurs twice."""
    return _Table(path, stream, kind).columns


def rows(path: Path, stream: Stream, kind: str, check: Callable[[list[str]], None]) -> Iterator[Row]:
    """Yield the rows below the header, by the number of their last line. Blank lines are skipped.

    `check` is called with the names of the columns.

    Raises `DataError` for invalid quotes and for a row over the limit, because the next row cannot be found then.
    """
    table = _Table(path, stream, kind)
    check(table.columns)
    while (fields := table.next()) is not None:
        if len(fields) == len(table.columns):
            values: dict[str, Any] | BadRecord = dict(zip(table.columns, fields, strict=True))
        else:
            detail = f"has {len(fields)} fields, and the first line names {len(table.columns)} columns"
            values = BadRecord("with another number of fields than the header", detail)
        yield Row("line", table.number, values, stream.position)


class _Table:
    def __init__(self, path: Path, stream: Stream, kind: str) -> None:
        self.path = path
        self.number = 0
        """The number of the last line that was read."""
        self._bytes_of_row = 0
        self._reader = csv.reader(self._lines(stream), _DIALECTS[kind], strict=True)
        self.columns = self.next() or []
        require_distinct(self.columns, place(path, "line", self.number))

    def next(self) -> list[str] | None:
        """Return the fields of the next row, None at the end."""
        while True:
            self._bytes_of_row = 0
            # The module's limit holds for the whole process, so it is changed for one call only.
            limit = csv.field_size_limit(MOST_ROW_BYTES)
            try:
                fields = next(self._reader, None)
            except csv.Error as error:
                raise DataError(
                    f"{place(self.path, 'line', self.number)}: is not valid CSV: {quoted(error)}; correct the quotes, "
                    "or write the records as JSON lines"
                ) from None
            finally:
                csv.field_size_limit(limit)
            if fields != []:
                return fields

    def _lines(self, stream: Stream) -> Iterator[str]:
        for number, line in lines(self.path, stream):
            self.number = number
            self._bytes_of_row += len(line)
            if self._bytes_of_row > MOST_ROW_BYTES:
                raise_too_long(place(self.path, "line", number))
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{place(self.path, 'line', number)}: is not UTF-8 ({error.reason}); convert the file to UTF-8"
                ) from None

"""One row of a file of records, and the limits of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from bridge.errors import quoted
from gpt2_jax.data.compression import Stream
from gpt2_jax.data.errors import DataError

Unit = Literal["line", "record"]

MOST_ROW_BYTES = 2**24
"""Limit on one line, and on one record that spans lines. The longest books have about this size."""


class BadRecord(ValueError):
    """A record cannot be used. The reader of the next record is not affected."""

    def __init__(self, reason: str, detail: str = "", remedy: str = "correct it") -> None:
        super().__init__(detail or reason)
        self.remedy = remedy
        self.reason = reason
        """Why, in words that follow a number of records, such as "not valid JSON"."""


@dataclass(frozen=True)
class Row:
    """One record of a file."""

    unit: Unit
    """What the number counts."""
    number: int
    """Counted from 1."""
    values: Mapping[str, Any] | BadRecord
    """The value of each field, or why there are none."""
    position: int
    """The bytes of the file that were read so far."""

    def place_in(self, path: Path) -> str:
        """Return the file and the record, for a message."""
        return place(path, self.unit, self.number)


def place(path: Path, unit: Unit, number: int) -> str:
    """Return the file and the record, for a message."""
    return f"{quoted(path)}, {unit} {number}"


def lines(path: Path, stream: Stream) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their numbers, counted from 1.

    Raises `DataError` for a line that is too long or has a NUL byte.
    """
    number = 0
    while line := stream.readline(MOST_ROW_BYTES + 1):
        number += 1
        if len(line) > MOST_ROW_BYTES:
            raise_too_long(place(path, "line", number))
        if b"\0" in line:
            raise DataError(
                f"{place(path, 'line', number)}: has a NUL byte, which text does not have; the file is damaged or is "
                "not UTF-8"
            )
        yield number, line


def raise_too_long(where: str) -> NoReturn:
    raise DataError(f"{where}: has more than {MOST_ROW_BYTES} bytes, the limit for one record; split it")


def require_distinct(columns: list[str], where: str) -> None:
    """Raise `DataError` if two columns have the same name."""
    name, count = Counter(columns).most_common(1)[0] if columns else ("", 0)
    if count > 1:
        raise DataError(f"{where}: the column {quoted(name)} occurs {count} times; rename all but one")

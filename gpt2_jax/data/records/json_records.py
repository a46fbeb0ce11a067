"""Records in JSON: one object per line, or one array of objects."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bridge.errors import quoted
from bridge.storage.json_text import require_few_elements
from gpt2_jax.data.compression import BUFFER_BYTES, Stream
from gpt2_jax.data.errors import DataError
from gpt2_jax.data.records.rows import MOST_ROW_BYTES, BadRecord, Row, lines, place, raise_too_long

_MOST_ELEMENTS = 2**21
"""Limit on the values of one record. Characters in strings that look like JSON count too."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")


def is_array(stream: Stream) -> bool:
    """Whether the first character is that of a JSON array. The stream does not move."""
    return stream.peek(64).removeprefix(_BYTE_ORDER_MARK).lstrip(b" \t\r\n").startswith(b"[")


def rows_of_lines(path: Path, stream: Stream) -> Iterator[Row]:
    """Yield the objects of JSON lines. Blank lines are skipped."""
    for number, line in lines(path, stream):
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if line.isspace() or not line:
            continue
        require_few_elements(line, place(path, "line", number), DataError, _MOST_ELEMENTS)
        try:
            values: dict[str, Any] | BadRecord = _object(json.loads(_text(line)))
        except BadRecord as bad:
            values = bad
        except (ValueError, RecursionError) as error:
            values = _not_json(error)
        yield Row("line", number, values, stream.position)


def rows_of_array(path: Path, stream: Stream) -> Iterator[Row]:
    """Yield the objects of one array, which is read in pieces.

    Raises `DataError` where the array is not valid JSON, because the next object cannot be found then.
    """
    array = _Array(path, stream)
    array.require("[")
    if array.next_character() == "]":
        array.require("]")
    else:
        while True:
            array.number += 1
            value = array.value()
            try:
                values: dict[str, Any] | BadRecord = _object(value)
            except BadRecord as bad:
                values = bad
            yield Row("record", array.number, values, stream.position)
            if array.next_character() == "]":
                array.require("]")
                break
            array.require(",")
    if array.next_character():
        raise array.error("has more text after the array")


class _Array:
    """The text of an array, from which values are taken one by one."""

    def __init__(self, path: Path, stream: Stream) -> None:
        self.path, self.stream = path, stream
        self.number = 0
        self._text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._at = 0

    def error(self, problem: str) -> DataError:
        return DataError(
            f"{place(self.path, 'record', max(1, self.number))}: {problem}; correct or write the file again"
        )

    def next_character(self) -> str:
        """Return the next character that is not white space, empty at the end of the file."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read(BUFFER_BYTES):
                return ""

    def require(self, character: str) -> None:
        if (found := self.next_character()) != character:
            raise self.error(f"expected {character} but found {quoted(found) if found else 'the end of the file'}")
        self._at += 1

    def value(self) -> Any:
        """Return the next value. If the text ends inside of it, twice as much is read."""
        self.next_character()
        size = BUFFER_BYTES
        while True:
            problem: Exception | None = None
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._at)
                if end < len(self._text):  # a number may continue in the text that follows
                    self._at = end
                    return value
            except (ValueError, RecursionError) as error:
                problem = error
            if len(self._text) - self._at > MOST_ROW_BYTES:
                raise_too_long(place(self.path, "record", self.number))
            if isinstance(problem, RecursionError) or not self._read(size):
                raise self.error(f"is not valid JSON: {quoted(problem or 'the array does not end')}")
            size *= 2

    def _read(self, size: int) -> bool:
        """Append up to `size` bytes of the file to the text. Returns whether there were any."""
        data = self.stream.read(size)
        if b"\0" in data:
            raise self.error("has a NUL byte near it, which text does not have")
        try:
            self._text = self._text[self._at :] + self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise self.error(f"is not UTF-8 ({error.reason})") from None
        self._at = 0
        if len(self._text) > _MOST_ELEMENTS // 4:
            where = place(self.path, "record", self.number)
            require_few_elements(self._text.encode(), where, DataError, _MOST_ELEMENTS)
        return bool(data)


def _text(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8", f"is not UTF-8 ({error.reason})") from None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRecord("not a JSON object", f"is {type(value).__name__} and not an object")
    return value


def _not_json(error: Exception) -> BadRecord:
    return BadRecord("not valid JSON", f"is not valid JSON: {quoted(error)}")

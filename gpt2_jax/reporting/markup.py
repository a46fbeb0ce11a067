"""HTML of text, tables and marks. All text is escaped here."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bridge.errors import escaped

GENERATOR = "gpt2-bridge"
HTML_START = f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{GENERATOR} """
"""The beginning of every page, by which a later command recognises it."""

Status = Literal["passed", "failed", "skipped", "informational"]

_MARKS: dict[Status, str] = {"passed": "✓", "failed": "✗", "skipped": "–", "informational": "ℹ"}  # noqa: RUF001


@dataclass(frozen=True)
class Mark:
    """An outcome: a color, a sign and a word."""

    status: Status
    word: str = ""
    """The default is the name of the status."""

    @property
    def text(self) -> str:
        """The sign and the word, as HTML."""
        return f"{_MARKS[self.status]} {html_text(self.word or self.status)}"

    def to_html(self) -> str:
        return f'<span class="mark {self.status}">{self.text}</span>'


@dataclass(frozen=True)
class Number:
    """A number in a table. It is aligned to the right and not wrapped."""

    text: str


Cell = str | Number | Mark


@dataclass(frozen=True)
class Table:
    """A table. The first column is the header of its row if `row_headers` is true."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    row_headers: bool = False

    def to_html(self) -> str:
        """A table in a box of its own, in which a wide table scrolls."""
        head = "".join(f'<th scope="col">{html_text(name)}</th>' for name in self.columns)
        rows = "\n".join(f"<tr>{self._row(row)}</tr>" for row in self.rows)
        caption = html_text(self.caption)
        return (
            f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table>'
            f"<caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
        )

    def _row(self, row: Sequence[Cell]) -> str:
        cells = [_cell(cell) for cell in row]
        if self.row_headers and isinstance(row[0], str):
            cells[0] = f'<th scope="row">{html_text(row[0])}</th>'
        return "".join(cells)


def facts(caption: str, values: Mapping[str, object]) -> Table:
    """A table of names and values."""
    return Table(caption, ("name", "value"), tuple((name, str(value)) for name, value in values.items()), True)


def _cell(cell: Cell) -> str:
    if isinstance(cell, Mark):
        return f'<td class="outcome">{cell.to_html()}</td>'
    if isinstance(cell, Number):
        return f'<td class="number">{html_text(cell.text)}</td>'
    return f"<td>{html_text(cell)}</td>"


def html_text(text: str) -> str:
    """Escape text for an element or an attribute. Control characters and lone surrogates become visible escapes.

    >>> html_text("<script>\\x00")
    '&lt;script&gt;\\\\x00'
    """
    return html.escape(escaped(text))


def slug(text: str) -> str:
    """An id of letters, digits and hyphens.

    >>> slug("hidden states")
    'hidden-states'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def number(value: float) -> str:
    """A number with four digits.

    >>> number(1.23456e-12)
    '1.235e-12'
    """
    return f"{value:.4g}"

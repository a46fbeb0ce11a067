"""Terminal output. Untrusted text is escaped, so that it cannot control the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich import console as rich
from rich.segment import Segment
from rich.text import Text

from bridge.errors import escaped

REPORT_WIDTH = 120
"""Columns if the output is not a terminal. Tables need more than the usual 80."""

_LAYOUT = "\n\t\u00a0\u202f\u3000"
"""Characters that are not escaped although `str.isprintable` is false: line breaks, tabs, and typographic spaces."""


class Console(rich.Console):
    """A console that escapes control characters and bidirectional marks in text.

    Markup and emoji codes in text are not interpreted. rich's own styles and cursor movements are not escaped.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape text before rich measures it, so that column widths match the printed text."""
        return super().render_str(escaped(text, _LAYOUT), **options)

    def render(self, renderable: rich.RenderableType, options: rich.ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escaped(segment.text, _LAYOUT))


def console() -> Console:
    """Return the console for results, on standard output."""
    return Console(width=None if sys.stdout.isatty() else REPORT_WIDTH)


def print_error(message: str) -> None:
    """Print one error of the command on standard error."""
    print(f"gpt2: {escaped(message)}", file=sys.stderr)

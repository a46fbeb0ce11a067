"""What reaches a terminal: text in which no character controls it, wherever the text is from."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich import console as rich
from rich.segment import Segment
from rich.text import Text

from bridge.errors import escaped

REPORT_WIDTH = 120
"""Columns where the output is no terminal; tables need more than the customary 80."""

_LAYOUT = "\n\t\u00a0\u202f\u3000"
"""Line breaks, tabs, and the spaces of French, Chinese and Japanese text, which Python does not call printable."""


class Console(rich.Console):
    """A console that prints control characters and marks of direction escaped.

    Text is never markup, and nothing in it is replaced by emoji. Styles, and the cursor movements of progress bars,
    are rich's own and stay.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Escaped before it is measured, so that columns are as wide as what is printed."""
        return super().render_str(escaped(text, _LAYOUT), **options)

    def render(self, renderable: rich.RenderableType, options: rich.ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escaped(segment.text, _LAYOUT))


def console() -> Console:
    """Standard output, for what was asked for."""
    return Console(width=None if sys.stdout.isatty() else REPORT_WIDTH)


def print_error(message: str) -> None:
    """One error of the command on standard error."""
    print(f"gpt2: {escaped(message)}", file=sys.stderr)

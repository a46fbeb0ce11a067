"""Convert docstrings to reStructuredText. In this project they use Markdown's single backticks and no other markup."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

_CODE = re.compile(r"(`+)(.+?)\1")


def _escaped(text: str) -> str:
    """Escape what reStructuredText would read as markup: `*args`, `name_`, `|a|`."""
    text = re.sub(r"([*|])", r"\\\1", text)
    return re.sub(r"(?<=\w)_(?!\w)", r"\\_", text)


def _converted(paragraph: str) -> str:
    parts, end = [], 0
    for match in _CODE.finditer(paragraph):
        parts += [_escaped(paragraph[end : match.start()]), f"``{match[2]}``"]
        # Literal text must end at a word boundary: `embedding`s needs an escaped space.
        parts += ["\\ "] if paragraph[match.end() : match.end() + 1].isalnum() else []
        end = match.end()
    return "".join([*parts, _escaped(paragraph[end:])])


def _convert(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    # Doctests keep their text.
    text = "\n".join(lines)
    blocks = re.split(r"(\n\s*\n)", text)
    lines[:] = "".join(b if b.lstrip().startswith(">>>") else _converted(b) for b in blocks).split("\n")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _convert, priority=400)  # before napoleon
    return {"parallel_read_safe": True}

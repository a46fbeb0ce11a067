"""The Python snippets and the `gpt2` lines of the README and of the manual."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))

_BLOCK = re.compile(r"^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Line:
    """One `gpt2` command on a page."""

    page: str
    text: str
    args: tuple[str, ...]
    """The words after `gpt2`."""

    def __str__(self) -> str:
        return f"{self.page}: gpt2 {shlex.join(self.args)}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def python_of(page: Path) -> str:
    """Return the snippets of a page as one program with the line numbers of the page."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * text.count("\n")
    for block in _BLOCK.finditer(text):
        if block["info"] == "python":
            first = text.count("\n", 0, block.start("text"))
            snippet = block["text"].splitlines()
            lines[first : first + len(snippet)] = snippet
    return "\n".join(lines)


def commands_of(page: Path, *, notebook_cells: bool = False) -> Iterator[Line]:
    """Yield the `gpt2` lines in the shell blocks of a page, or in the cells of a notebook, which the build executes."""
    for block in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        is_cell = block["info"].startswith("{code-cell}")
        if is_cell if notebook_cells else block["info"] == "sh":
            for line in block["text"].replace("\\\n", " ").splitlines():
                if args := _words_after_gpt2(line.removeprefix("!") if is_cell else line):
                    yield Line(name_of(page), line, args)


def _words_after_gpt2(line: str) -> tuple[str, ...]:
    """Return the arguments of `gpt2`, which may follow variables or another command, or be inside an argument."""
    if not re.search(r"\bgpt2 \w", line.partition("#")[0]) or re.match(r"\s*(import|from)\b", line):
        return ()
    words = shlex.split(line, comments=True)
    for word in words:
        if " " in word and "gpt2 " in word:  # --command="gpt2 train ..."
            words = shlex.split(word.partition("=")[2])
    return tuple(words[words.index("gpt2") + 1 :]) if "gpt2" in words else ()

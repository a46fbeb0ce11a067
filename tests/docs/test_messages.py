"""The messages that the manual quotes are messages of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from support.documents import ROOT

PAGE = ROOT / "docs" / "how-to" / "troubleshooting.md"
QUOTED = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def texts_of(source: str) -> Iterator[str]:
    """Yield the strings of a module, without its docstrings, and with `...` for what an f-string formats."""
    nodes = list(ast.walk(ast.parse(source)))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    files = [file for package in ("bridge", "gpt2_jax", "gpt2_torch") for file in (ROOT / package).rglob("*.py")]
    return [text for file in files for text in texts_of(file.read_text(encoding="utf-8"))]


def test_the_table_is_short() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert 10 <= len(QUOTED) == len(rows) <= 15


@pytest.mark.parametrize("message", QUOTED)
def test_every_quoted_message_is_in_the_code(message: str, texts: list[str]) -> None:
    assert any(message in text for text in texts), f"no message of the code contains {message!r}; mend {PAGE.name}"


def test_a_message_that_is_not_in_the_code_is_found(texts: list[str]) -> None:
    assert not any("the checkpoint is on holiday" in text for text in texts)


def test_what_an_f_string_formats_is_left_open() -> None:
    assert "needs ... devices" in texts_of('raise E(f"needs {n} " "devices")')


def test_docstrings_are_not_messages() -> None:
    assert list(texts_of('def f():\n    """Raise for a truncated file."""\n    raise E("short")')) == ["short"]

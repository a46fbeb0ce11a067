"""Every verb escapes control characters in names and fields that come from files."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.progress import TextColumn
from rich.table import Table
from rich.text import Text
from support.commands import needs_torch, run

from bridge.errors import escaped
from gpt2_jax.console.output import progress
from gpt2_jax.console.terminal import Console, print_error
from gpt2_jax.training import PRESETS
from gpt2_jax.training.config import flat
from gpt2_jax.training.run.identity import VERSION

NAME = "a\x1b]0;x\x07\x1b[31m\u202eb\x9b1m\x7f"
"""Escape sequences for the title and the colour, a right-to-left mark, and a one-byte sequence start."""
SHOWN = r"a\x1b]0;x\x07\x1b[31m\u202eb\x9b1m\x7f"


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a command printed, after checking that all of it but line breaks is printable."""
    out, errors = capsys.readouterr()
    assert all(line.isprintable() for text in (out, errors) for line in text.split("\n"))
    return out + errors


def test_printable_text_is_unchanged() -> None:
    text = "naïve ✓ 你好 🎵 [bold]x[/bold] :smile: C:\\new"
    assert escaped(text) == text
    out = io.StringIO()
    Console(file=out).print(text + "\u3000", soft_wrap=True)
    assert out.getvalue() == text + "\u3000\n"


@pytest.mark.parametrize("make", [str, Text], ids=["str", "Text"])
def test_a_console_escapes_text_and_keeps_styles(make: type) -> None:
    table = Table("name", box=None, pad_edge=False)
    table.add_row(make(NAME), style="bold")
    for renderable in (make(NAME), table):
        out = io.StringIO()
        Console(file=out, force_terminal=True, width=120).print(renderable, style="red")
        assert "\x1b[" in out.getvalue()  # the style's own escape sequence
        plain = out.getvalue().replace("\x1b[31m", "").replace("\x1b[1;31m", "").replace("\x1b[0m", "")
        assert all(line.isprintable() for line in plain.split("\n"))
        assert SHOWN[:9] in plain


def test_the_width_of_a_cell_is_that_of_the_escaped_text() -> None:
    table = Table("name", "next", box=None, pad_edge=False)
    table.add_row(NAME, "1")
    out = io.StringIO()
    Console(file=out, width=120).print(table)
    assert f"{SHOWN}  1" in out.getvalue()


def test_a_progress_bar_escapes_its_description(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr("sys.stderr", out)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress(TextColumn("{task.description}", markup=False)) as bar:
        bar.add_task(NAME)
    assert SHOWN[:10] in out.getvalue()
    assert "\x1b]0" not in out.getvalue()
    assert "\u202e" not in out.getvalue()


def test_an_error_keeps_line_breaks_and_escapes_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(f"{NAME}\n  - \ttwo")
    assert capsys.readouterr().err == f"gpt2: {SHOWN}\n  - \\ttwo\n"


@pytest.fixture
def named(model: Path, tmp_path: Path) -> Path:
    """The model in a directory named `NAME`, with a field and a file of that name."""
    directory = tmp_path / NAME
    shutil.copytree(model, directory)
    fields = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**fields, NAME: NAME, "_name_or_path": NAME}))
    (directory / NAME).touch()
    return directory


VERBS = {
    "inspect": ("inspect", "{named}", "--tensors"),
    "convert": ("convert", "{named}", "{named}-flax", "--to", "flax"),
    "verify": ("verify", "{named}", "--checks", "round-trip"),
    "diff": ("diff", "{named}", "{named}/../model"),
    "generate": ("generate", "{named}", NAME, "--max-new-tokens", 2),
    "generate to a file": ("generate", "{named}", NAME, "--max-new-tokens", 2, "--json", "{named}.json"),
    "eval": ("eval", "{named}", "--data", "{text}", "--max-tokens", 20, "--context", 8),
}
REFUSED = {
    "a missing source": ("inspect", "{named}/nowhere"),
    "an existing target": ("convert", "{named}", "{named}", "--to", "flax"),
    "a missing text file": ("verify", "{named}", "--text-file", "{named}/nowhere"),
    "a missing file of prompts": ("generate", "{named}", "--lines", "{named}/nowhere"),
    "missing data": ("train", "--data", "{named}/nowhere", "--out", "{named}/run"),
    "an unknown preset": ("train", "--preset", NAME, "--out", "{named}/run"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_torch if n == "verify" else ()) for n in (*VERBS, *REFUSED)]
)
def test_no_verb_prints_a_control_character(
    name: str, named: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / f"{NAME}.txt"
    text.write_text("We hold these truths to be self-evident " + NAME)
    arguments = [str(a).format(named=named, text=text) if a != NAME else a for a in (VERBS | REFUSED)[name]]
    code = run(*arguments)
    assert code == (2 if name in REFUSED else 0)
    assert printed(capsys)


def test_the_help_of_a_resumed_run_escapes_its_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {**flat(PRESETS["nano"]), "data": NAME, "sample_prompt": NAME, "tokenizer": NAME}
    stored = {"version": VERSION, "config": config, "data": "", "tokenizer": None}
    (tmp_path / "run.json").write_text(json.dumps(stored))
    assert run("train", "--resume", "--out", tmp_path, "--help") == 0
    assert SHOWN[:9] in printed(capsys)


@pytest.mark.processes
@pytest.mark.usefixtures("quick_compilation")
def test_training_prints_no_control_character(named: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / f"{NAME}.txt"
    text.write_text("We hold these truths to be self-evident. " * 40)
    sizes = ("--max-steps", 2, "--batch-size", 2, "--seq-len", 8, "--eval-batches", 1, "--sample-tokens", 4)
    places = ("--data", text, "--cache", tmp_path / "cache")
    run_arguments = ("train", "--init-from", named, *places, "--out", tmp_path / f"run{NAME}", *sizes)
    assert run(*run_arguments) == 0
    assert SHOWN in printed(capsys)
    assert run(*run_arguments) == 2
    assert SHOWN in printed(capsys)

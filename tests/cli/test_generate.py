"""`gpt2 generate`: sources of prompts, streaming, and equal text in both backends."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.commands import CONFIG, needs_torch, run

from gpt2_jax.cli.verbs.generate import _read_prompt

BACKENDS = ("jax", "torch")


@pytest.fixture
def completions(model: Path, tmp_path: Path) -> Any:
    """Return a function that runs the command and returns the completions of its `--json` report."""

    def made(*arguments: object) -> list[dict[str, Any]]:
        assert run("generate", model, *arguments, "--json", tmp_path / "g.json", "--overwrite") == 0
        return json.loads((tmp_path / "g.json").read_text())["completions"]

    return made


@pytest.mark.parametrize("backend", ["jax", pytest.param("torch", marks=needs_torch)])
def test_the_prompt_is_continued(backend: str, completions: Any, capsys: pytest.CaptureFixture[str]) -> None:
    [made] = completions("We", "--backend", backend, "--max-new-tokens", 5)
    assert made["prompt"] == "We"
    assert len(made["ids"]) == len(made["logprobs"]) == 5
    assert capsys.readouterr().out.startswith("We")


@needs_torch
@pytest.mark.parametrize(
    "sampling", [(), ("--temperature", 1.0, "--top-p", 0.9, "--seed", 3)], ids=["greedy", "sampled"]
)
def test_both_backends_give_the_same_text(sampling: tuple[object, ...], completions: Any) -> None:
    jax, torch = (completions("We hold", "--backend", backend, *sampling) for backend in BACKENDS)
    assert jax[0]["ids"] == torch[0]["ids"]


def test_a_seed_gives_the_same_sample_and_another_seed_another(completions: Any) -> None:
    first, same, other = (
        completions("We hold", "--temperature", 1.0, "--top-k", 40, "--seed", seed) for seed in (1, 1, 2)
    )
    assert first == same != other


def test_the_streamed_text_is_the_final_text(model: Path, completions: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("We", "--temperature", 1.0, "--max-new-tokens", 20)
    completions(*arguments)
    whole = capsys.readouterr().out
    assert run("generate", model, *arguments) == 0
    assert capsys.readouterr().out == whole


def test_by_default_the_tokens_fit_into_the_positions(completions: Any) -> None:
    [made] = completions("x" * (CONFIG.n_positions - 3), "--no-stop-at-end")
    assert len(made["ids"]) == 3


def test_slide_continues_past_the_positions(completions: Any) -> None:
    [made] = completions("We", "--slide", "--max-new-tokens", CONFIG.n_positions + 9, "--no-stop-at-end")
    assert len(made["ids"]) == CONFIG.n_positions + 9


def test_each_line_of_a_file_is_a_prompt(completions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("We hold\n\nthese\n")
    sampling = ("--temperature", 1.0, "--max-new-tokens", 10)
    made = completions("--lines", lines, "--num-return-sequences", 2, *sampling)
    assert [c["prompt"] for c in made] == ["We hold", "We hold", "these", "these"]
    assert made[0]["ids"] != made[1]["ids"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.read_bytes())))
    assert completions("--lines", "-", "--num-return-sequences", 2, *sampling) == made
    [alone] = completions("these", *sampling)
    assert (alone["ids"], alone["text"]) == (made[2]["ids"], made[2]["text"])


def test_a_prompt_from_standard_input(completions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"We\r\nhold\n")))
    assert completions("-")[0]["prompt"] == "We\nhold"


def test_a_byte_order_mark_is_not_part_of_a_prompt(
    completions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked = "\ufeffWe\n".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(marked)))
    assert completions("-")[0]["prompt"] == "We"
    (tmp_path / "lines").write_bytes(marked)
    assert completions("--lines", tmp_path / "lines")[0]["prompt"] == "We"
    monkeypatch.setattr("builtins.input", lambda _: marked.decode().strip())
    assert _read_prompt() == "We"


def test_a_prompt_that_is_not_utf8_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert run("generate", model, "-") == 2
    assert "standard input is not UTF-8" in capsys.readouterr().err


def test_the_text_ends_before_a_stop_string(completions: Any) -> None:
    [whole] = completions("We", "--temperature", 1.0)
    stop = whole["text"][4:6]
    [cut] = completions("We", "--temperature", 1.0, "--stop", stop)
    assert cut["stopped"]
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]


def test_beams_are_in_order_best_first(completions: Any) -> None:
    made = completions("We", "--num-beams", 3, "--num-return-sequences", 3, "--max-new-tokens", 6, "--no-stop-at-end")
    totals = [sum(c["logprobs"]) for c in made]
    assert totals == sorted(totals, reverse=True)


@needs_torch
def test_bfloat16_can_be_selected(completions: Any) -> None:
    for backend in BACKENDS:
        assert len(completions("We", "--backend", backend, "--dtype", "bfloat16", "--max-new-tokens", 4)[0]["ids"]) == 4


def test_interactive_mode_ends_with_an_empty_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["We", "y" * 999, "hold", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert run("generate", model, "--interactive", "--max-new-tokens", 4) == 0
    printed = capsys.readouterr()
    assert [line[:4] for line in printed.out.splitlines() if line[:2] == "We" or line[:4] == "hold"]
    assert "n_positions" in printed.err


def test_a_refused_prompt_prints_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", model, "We", "--max-new-tokens", 999) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "n_positions" in printed.err


def test_text_appears_before_the_last_token(model: Path) -> None:
    """The test runs a process: when its first text arrives, the process has not written everything."""
    command = "import sys; from gpt2_jax.cli import main; main(sys.argv[1:])"
    arguments = ["generate", str(model), "We", "--max-new-tokens", "38", "--no-stop-at-end"]
    with subprocess.Popen([sys.executable, "-c", command, *arguments], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read1()
        rest = process.stdout.read()
    assert process.returncode == 0
    assert first.startswith(b"We")
    assert rest


def test_a_closed_pipe_is_not_an_error(model: Path) -> None:
    command = "import sys; from gpt2_jax.cli import main; main(sys.argv[1:])"
    arguments = ["generate", str(model), "We", "--max-new-tokens", "38", "--no-stop-at-end"]
    with subprocess.Popen([sys.executable, "-c", command, *arguments], stdout=-1, stderr=-1) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE

"""`gpt2 generate`: sources of prompts, streaming, and equal text in both backends."""

from __future__ import annotations

import io
import json
import shutil
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


@pytest.mark.thorough
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


# The checkpoint's settings


@pytest.fixture
def configured(model: Path, tmp_path: Path) -> Any:
    """Return a function that copies the model with a `generation_config.json`, and runs the command on it."""

    def made(settings: dict[str, Any], *arguments: object) -> list[dict[str, Any]]:
        copy = tmp_path / "configured"
        shutil.copytree(model, copy, dirs_exist_ok=True)
        (copy / "generation_config.json").write_text(json.dumps(settings))
        assert run("generate", copy, *arguments, "--json", tmp_path / "c.json", "--overwrite") == 0
        return json.loads((tmp_path / "c.json").read_text())["completions"]

    return made


def test_the_settings_of_the_checkpoint_are_the_defaults(configured: Any, completions: Any) -> None:
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 5, "repetition_penalty": 1.3, "max_new_tokens": 6}
    flags = ("--temperature", 0.7, "--top-k", 5, "--repetition-penalty", 1.3, "--max-new-tokens", 6)
    assert configured(settings, "We", "--seed", 2) == completions("We", *flags, "--seed", 2)
    assert configured(settings, "We", "--temperature", 0) == completions("We", "--temperature", 0, *flags[4:])
    assert configured({**settings, "num_beams": 2, "do_sample": False}, "We") == completions(
        "We", "--num-beams", 2, *flags[4:]
    )


def test_max_length_includes_the_prompt(configured: Any) -> None:
    [made] = configured({"max_length": 9}, "We", "--no-stop-at-end")
    assert len(made["ids"]) == 9 - len("We")
    [made] = configured({"max_length": 10**6}, "We", "--no-stop-at-end")
    assert len(made["ids"]) == CONFIG.n_positions - len("We")


def test_the_text_ends_at_the_tokens_of_the_checkpoint(configured: Any, completions: Any) -> None:
    [whole] = completions("We", "--no-stop-at-end", "--max-new-tokens", 9)
    end = whole["ids"][4]
    expected = whole["ids"][: whole["ids"].index(end) + 1]
    [made] = configured({"eos_token_id": [end, 1]}, "We", "--max-new-tokens", 9)
    assert (made["ids"], made["stopped"]) == (expected, True)
    [made] = configured({"eos_token_id": end}, "We", "--max-new-tokens", 9, "--no-stop-at-end")
    assert made["ids"] == whole["ids"]


def test_settings_that_are_not_applied_are_named(configured: Any, capsys: pytest.CaptureFixture[str]) -> None:
    configured({"guidance_scale": 2.0, "suppress_tokens": [10**6]}, "We", "--max-new-tokens", 2)
    printed = capsys.readouterr().err
    assert "generation_config.json: 'guidance_scale'='2.0': not supported" in printed
    assert "suppress_tokens: 1 of its entries are outside the vocabulary" in printed


def test_a_note_names_the_file_that_it_is_about(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "m")
    fields = json.loads((model / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**fields, "eos_token_id": [5, 4000]}))
    (tmp_path / "m" / "generation_config.json").write_text('{"top_k": 7}')
    for verb in (("generate", tmp_path / "m", "We", "--max-new-tokens", 1), ("inspect", tmp_path / "m")):
        assert run(*verb) == 0
        captured = capsys.readouterr()
        printed = " ".join((captured.out + captured.err).split())
        assert "config.json: eos_token_id: 1 of its entries are outside the vocabulary" in printed
        assert "generation_config.json: eos_token_id:" not in printed
        assert "generation_config.json: no eos_token_id, so a text ends at that of config.json" in printed


def test_an_invalid_setting_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text('{"top_k": "many"}')
    assert run("generate", tmp_path / "m", "We") == 2
    assert "top_k='many': must be an integer" in capsys.readouterr().err
    assert run("inspect", tmp_path / "m") == 0
    assert "top_k='many': must be an integer" in capsys.readouterr().out


def test_inspect_shows_the_settings_and_the_end(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "m")
    settings = {"do_sample": True, "top_k": 5, "eos_token_id": [3, 4], "guidance_scale": 2.0}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(settings))
    assert run("inspect", tmp_path / "m", "--json", tmp_path / "i.json") == 0
    found = json.loads((tmp_path / "i.json").read_text())["generation"]
    assert found["settings"] == {"do_sample": True, "top_k": 5}
    assert (found["eos_token_ids"], found["eos_source"]) == ([3, 4], "generation_config.json")
    shown = " ".join(capsys.readouterr().out.split())
    assert "do_sample=True, top_k=5 (generation_config.json)" in shown
    assert "ends at 3, 4 (generation_config.json)" in shown
    assert "'guidance_scale'='2.0': not supported" in shown


def test_flags_without_effect_are_refused_given_the_settings(
    configured: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        configured({}, "We", "--seed", 3)
    assert "--seed: has no effect without a --temperature" in capsys.readouterr().err
    configured({"do_sample": True}, "We", "--seed", 3, "--max-new-tokens", 2)
    with pytest.raises(AssertionError):
        configured({}, "We", "--early-stopping", "never")
    assert "--early-stopping: has no effect without --num-beams" in capsys.readouterr().err

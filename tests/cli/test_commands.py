"""The `gpt2` command: its verbs, errors, help and exit codes."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.commands import CONFIG, needs_torch, run
from support.models import huggingface_directory
from support.tokenizers_for_tests import write_byte_tokenizer

import bridge
from gpt2_jax.cli import main
from gpt2_jax.cli.parsing import parse_and_run
from gpt2_jax.cli.verbs import VERBS, load_verb
from gpt2_jax.cli.verbs.verify import ALL_CHECKS
from gpt2_jax.training.run.metrics import read_metrics


def test_inspect_shows_what_a_checkpoint_is(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", model, "--tensors", "--json", tmp_path / "facts.json") == 0
    shown = capsys.readouterr().out
    for expected in ("huggingface", "float32 x 28", "h.1.attn.c_attn.weight", "[48, 144]", "warnings", "none"):
        assert expected in shown
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["parameters"] == bridge.num_parameters(CONFIG)
    assert facts["config"]["n_head"] == 3
    assert facts["tensors"]["wte.weight"] == {"dtype": "float32", "shape": [256, 48]}


def test_inspect_shows_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(CONFIG, activation_function="relu", tie_word_embeddings=False)
    run("inspect", huggingface_directory(tmp_path / "unusual", config))
    shown = capsys.readouterr().out
    assert "the activation is relu" in shown
    assert "head is not tied" in shown


def test_converting_there_and_back_changes_no_byte(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("convert", model, tmp_path / "flax", "--to", "flax", "--json", tmp_path / "done.json") == 0
    assert run("convert", tmp_path / "flax", tmp_path / "back", "--to", "huggingface") == 0
    for name in ("model.safetensors", "vocab.json", "merges.txt"):
        assert (tmp_path / "back" / name).read_bytes() == (model / name).read_bytes()
    assert json.loads((tmp_path / "done.json").read_text())["tensors"] == 28
    assert "huggingface -> flax" in capsys.readouterr().out


def test_convert_splits_into_shards_on_request(model: Path, tmp_path: Path) -> None:
    assert run("convert", model, tmp_path / "out", "--to", "huggingface", "--max-shard-bytes", 100_000) == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert run("convert", model, tmp_path / "no", "--to", "flax", "--max-shard-bytes", 100_000) == 2
    assert not (tmp_path / "no").exists()


BAD = {
    "no such path": ("inspect", "{tmp}/nowhere"),
    "not a checkpoint": ("inspect", "{tmp}"),
    "unknown format": ("convert", "{model}", "{tmp}/out", "--to", "onnx"),
    "existing target": ("convert", "{model}", "{model}", "--to", "flax"),
    "prompt empty": ("generate", "{model}", ""),
    "too many tokens": ("generate", "{model}", "We", "--max-new-tokens", "39"),
    "negative temperature": ("generate", "{model}", "We", "--temperature", "-1"),
    "a negative top-k": ("generate", "{model}", "We", "--top-k", "-1"),
    "top-p of zero": ("generate", "{model}", "We", "--top-p", "0"),
    "two kinds of prompt": ("generate", "{model}", "We", "--interactive"),
    "missing file of prompts": ("generate", "{model}", "--lines", "{tmp}/nowhere.txt"),
    "sampled beams": ("generate", "{model}", "We", "--num-beams", "2", "--temperature", "1"),
    "several sequences in interactive mode": ("generate", "{model}", "--interactive", "--num-return-sequences", "2"),
    "seed without sampling": ("generate", "{model}", "We", "--seed", "1"),
    "seed with beams": ("generate", "{model}", "We", "--num-beams", "2", "--seed", "1"),
    "length penalty without beams": ("generate", "{model}", "We", "--length-penalty", "2"),
    "seed without an effect": ("verify", "{model}", "--seed", "1", "--checks", "round-trip"),
    "untrained and no prediction": ("verify", "{model}", "--untrained", "--checks", "round-trip"),
    "no sequence": ("verify", "{model}", "--batch-size", "0"),
    "missing text file": ("verify", "{model}", "--text-file", "{tmp}/nowhere.txt"),
    "unwritable json": ("convert", "{model}", "{tmp}/out", "--to", "flax", "--json", "{tmp}/nowhere/facts.json"),
    "no source": ("inspect", ""),
    "name in brackets": ("inspect", "{tmp}/br[/x]"),
    "seed below zero": ("verify", "{model}", "--seed", "-1"),
    "seed too large": ("generate", "{model}", "We", "--seed", "99999999999999999999"),
    "two texts": ("verify", "{model}", "--text", "a", "--text-file", "{model}/config.json"),
    "no checks": ("verify", "{model}", "--checks"),
    "overwriting a foreign directory": ("convert", "{model}", "{tmp}", "--to", "flax", "--overwrite"),
    "unknown verb": ("transmogrify",),
    "missing argument": ("convert", "{model}"),
    "name that is too long": ("train", "--data", "a" * 300, "--out", "{tmp}/run"),
    "demo into a file": ("demo", "--out", "{model}/config.json"),
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD.keys())
def test_bad_input_exits_with_2_and_a_message(
    arguments: tuple[str, ...], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert run(*(a.format(tmp=tmp_path, model=model) for a in arguments)) == 2
    printed = capsys.readouterr()
    assert (printed.out + printed.err).strip()
    assert "Traceback" not in printed.out + printed.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("verb", ["inspect", "verify", "generate", "eval"])
def test_the_default_source_is_the_bundled_model(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.signature(load_verb(verb, ())).parameters["source"].default == str(bridge.BUNDLED)
    assert run(verb, "--help") == 0
    shown = capsys.readouterr().out
    assert "(default: bundled)" in shown
    assert str(bridge.BUNDLED) not in shown


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verb, "--help") == 0
    assert f"Example: gpt2 {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (("inpsect",), "did you mean inspect?"),
        (("train", "--preset", "nanu", "--out", "x"), "did you mean nano?"),
        (("train", "--batch-sise", "2", "--out", "x"), "--batch-size"),
        (("generate", "--temprature", "1"), "--temperature"),
    ],
)
def test_a_misspelled_verb_preset_or_flag_gets_a_suggestion(
    arguments: tuple[str, ...], suggestion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert suggestion in capsys.readouterr().err


def test_the_help_of_the_command_has_one_line_per_verb(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    assert run("--help") == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if "• inspect" in line)
    shown = [line.strip("│ ") for line in lines[start : start + len(VERBS)]]
    assert [line.split() for line in shown] == [["•", name, *verb.summary.split()] for name, verb in VERBS.items()]


@pytest.mark.parametrize("verb", VERBS)
def test_defaults_in_the_help_are_not_python_code(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verb, "--help") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for noise in ("{None}", "(default: None)", "(default: )", "PosixPath", "MISSING"):
        assert noise not in shown


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("width", [80, 120])
def test_the_help_fits_the_terminal(
    verb: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert run(verb, "--help") == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= width


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_knows_verbs_and_flags(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--tyro-print-completion", shell])
    assert not ended.value.code
    script = capsys.readouterr().out
    assert all(word in script for word in (*VERBS, "max-shard-bytes", "learning-rate"))


@pytest.mark.parametrize("words", [["--help"], ["--tyro-print-completion", "bash"]])
def test_help_and_completion_report_a_full_disk(words: list[str]) -> None:
    command = [sys.executable, "-c", "from gpt2_jax.cli import main; main()", *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "gpt2: No space left on device\n")


@pytest.mark.parametrize("words", [("none",), ("None",), ()])
def test_an_optional_flag_accepts_none(words: tuple[str, ...]) -> None:
    found = []

    def verb(*, limit: int | None = None) -> None:
        found.append(limit)

    parse_and_run(verb, "verb", ["--limit", *words] if words else [])
    assert found == [None]


def test_the_installed_command_runs(model: Path) -> None:
    command = Path(sys.executable).with_name("gpt2")
    done = subprocess.run([command, "inspect", model], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "parameters" in done.stdout
    failed = subprocess.run([command, "inspect", model / "nowhere"], capture_output=True, text=True, timeout=60)
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1


def test_verify_without_torch_says_how_to_install_it(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("verify", model) == 2
    assert "pip install 'gpt2-bridge[torch]'" in capsys.readouterr().err


def test_names_in_brackets_are_not_markup(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "o[/b]"
    assert run("convert", model, target, "--to", "flax") == 0
    assert str(target) in capsys.readouterr().out
    assert run("inspect", target) == 0


@needs_torch
def test_a_float64_checkpoint_generates_in_float64(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = huggingface_directory(tmp_path / "wide", CONFIG, dtype="float64")
    write_byte_tokenizer(path)
    for backend in ("jax", "torch"):
        assert run("generate", path, "We", "--backend", backend, "--max-new-tokens", 4) == 0
    first, second = capsys.readouterr().out.split("We")[1:]
    assert first.strip() == second.strip()


def test_version_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"gpt2-bridge {bridge.__version__}\n"


@needs_torch
@pytest.mark.processes
def test_the_demo_converts_verifies_fine_tunes_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, text = tmp_path / "demo", tmp_path / "text.txt"
    text.write_text("for word in words:\n    print(word)\n" * 2000)
    assert run("demo", "--out", out, "--max-steps", 3, "--data", text) == 0
    assert json.loads((out / "report.json").read_text())["passed"] is True
    assert bridge.load(out / "run" / "export").config.n_embd == bridge.load("bundled").config.n_embd
    shown = capsys.readouterr().out
    assert "the two backends are the same function" in shown
    first, *_, last = [record["val_loss"] for record in read_metrics(out / "run") if "val_loss" in record]
    summary = shown[shown.index("before, PyTorch") :]
    for expected in ("after, PyTorch", "after, JAX", "10 of 10 checks", f"{first:.3f} -> {last:.3f}", "identical"):
        assert expected in summary
    ending = "\n".join(shown.splitlines()[-3:])
    assert all(name in ending for name in ("report.json", "loss.png", "export"))
    assert run("demo", "--out", out) == 2  # an existing run is kept without --overwrite
    assert "--overwrite" in capsys.readouterr().err


def test_verify_accepts_exactly_the_existing_checks() -> None:
    """The names are repeated in the verb, so that `gpt2 verify --help` needs no torch."""
    from gpt2_jax.parity import CHECKS

    assert tuple(CHECKS) == ALL_CHECKS

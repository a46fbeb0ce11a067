"""`gpt2 train`: flags, presets, output, exit codes, and other programs that read its run."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from support import commands
from support.implementations import relative_error
from support.models import huggingface_directory, random_ids
from support.training_runs import RECIPE, files, write_text
from tokenizing.kinds import KINDS

import bridge
import gpt2_jax
from bridge import GPT2Config
from bridge.formats.trainers.run import steps
from gpt2_jax.cli import run_training
from gpt2_jax.cli.config_flags import default_config
from gpt2_jax.training import PRESETS, OptimizerConfig, TrainConfig
from gpt2_jax.training.config import flat
from gpt2_jax.training.run.identity import stored_identity
from gpt2_jax.training.run.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")

FLOAT32 = 1e-5
"""Limit on the difference of two float32 implementations with two layers, relative to the largest logit."""


def flags_of(config: TrainConfig, beside: TrainConfig) -> list[str]:
    """Return the flags that turn the preset `beside` into `config`."""
    given = []
    for name, value in flat(config).items():
        flag = name.replace("_", "-")
        if value != flat(beside)[name]:
            given += (
                [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
            )
    return given


RECIPE_FLAGS = flags_of(RECIPE, PRESETS["nano"])


def run(*arguments: object) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error of `gpt2 ARGUMENTS`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = commands.run(*arguments)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, quick_compilation: None) -> Path:
    """A directory with text.txt, cache, run, ended.json, and the command's output in out.txt."""
    directory = tmp_path_factory.mktemp("trained")
    text, out, ended = write_text(directory), directory / "run", directory / "ended.json"
    places = ("--data", text, "--cache", directory / "cache", "--out", out, "--json", ended)
    code, printed, errors = run("train", *places, *RECIPE_FLAGS)
    assert (code, errors) == (0, "")
    (directory / "out.txt").write_text(printed)
    return directory


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def test_a_run_prints_its_size_losses_and_files(trained: Path) -> None:
    printed = (trained / "out.txt").read_text()
    parameters = bridge.num_parameters(RECIPE.model)
    for expected in (
        "tokens (bytes)",
        f"{parameters:,} parameters, 48 tokens a step",
        "step      6  validation loss",
        str(trained / "run" / "export"),
        str(trained / "run" / "loss.png"),
        "metrics.jsonl",
    ):
        assert expected in printed
    ended = json.loads((trained / "ended.json").read_text())
    assert (ended["step"], ended["stopped_by"], ended["run"]) == (6, None, str(trained / "run"))


def test_flags_override_the_preset_and_are_stored(trained: Path) -> None:
    stored = stored_identity(trained / "run").config
    assert stored == replace(RECIPE, data=str(trained / "text.txt"), examples="stream")  # "auto" for text


def test_the_export_is_the_same_function_in_every_implementation(trained: Path) -> None:
    """The run has no biases and a padded vocabulary; the export has zero biases and no padding."""
    import torch
    import transformers

    import gpt2_torch

    export, ids = trained / "run" / "export", random_ids(RECIPE.model, length=12)
    model, params = gpt2_jax.from_pretrained(trained / "run")
    expected = np.asarray(model.apply({"params": params}, jnp.asarray(ids)))
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(export, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        found = {
            "transformers": loaded.eval()(torch.from_numpy(ids)).logits.numpy(),
            "gpt2_torch": gpt2_torch.GPT2.from_pretrained(export)(torch.from_numpy(ids)).numpy(),
        }
    for name, logits in found.items():
        assert relative_error(logits, expected) < FLOAT32, name


def test_the_export_has_the_tokenizer(trained: Path) -> None:
    import transformers

    text = "line 1 says é\n"
    ids = bridge.load(trained / "run").tokenizer().encode(text, special_tokens="as_text")
    assert ids == list(text.encode())
    assert transformers.AutoTokenizer.from_pretrained(trained / "run" / "export")(text)["input_ids"] == ids
    config = transformers.AutoConfig.from_pretrained(trained / "run" / "export")
    assert (config.bos_token_id, config.eos_token_id) == (256, 256)  # not OpenAI's 50256


def test_generate_and_convert_read_a_run(trained: Path, tmp_path: Path) -> None:
    code, printed, _ = run("generate", trained / "run", "line", "--max-new-tokens", 3)
    assert (code, printed[:4]) == (0, "line")
    assert run("convert", trained / "run", tmp_path / "out", "--to", "huggingface", "--zero-biases")[0] == 0
    exported = (trained / "run" / "export" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == exported


def test_a_warm_up_that_does_not_end_is_named(copy: Path, trained: Path) -> None:
    again = ("--out", copy / "run", "--resume", "--accept-changes", "--max-steps", 7)
    code, printed, _ = run("train", *again, "--warmup-steps", 7)
    assert code == 0
    assert "warning: --warmup-steps 7 is not below --max-steps, so the learning rate stays below its maximum" in printed
    assert "--warmup-steps" not in (trained / "out.txt").read_text()


def test_resume_uses_the_stored_configuration(copy: Path) -> None:
    before = stored_identity(copy / "run")
    metrics = read_metrics(copy / "run")
    code, _, errors = run("train", "--resume", "--out", copy / "run", "--cache", copy / "cache")
    assert (code, errors) == (0, "")
    assert stored_identity(copy / "run") == before
    assert read_metrics(copy / "run") == metrics


def test_resume_with_a_changed_flag_needs_accept_changes(copy: Path) -> None:
    again = ("train", "--resume", "--out", copy / "run", "--cache", copy / "cache")
    code, _, errors = run(*again, "--batch-size", 2, "--n-layer", 3)
    assert code == 2
    assert "batch_size was '4', now '2'" in errors
    assert "n_layer was '2', now '3'" in errors
    assert "Traceback" not in errors
    assert run(*again, "--beta2", 0.9, "--accept-changes")[0] == 0
    assert stored_identity(copy / "run").config.optimizer.beta2 == 0.9


def test_fine_tuning_takes_sizes_and_tokenizer_from_its_source(copy: Path) -> None:
    source, out = copy / "run" / "export", copy / "tuned"
    quick = ("--max-steps", 1, "--batch-size", 2, "--seq-len", 8, "--eval-batches", 1, "--sample-tokens", 0)
    places = ("--out", out, "--data", copy / "text.txt", "--cache", copy / "cache")
    code, _, errors = run("train", "--init-from", source, *places, *quick, "--n-layer", 2)  # the same as in the source
    assert (code, errors) == (0, "")
    config = stored_identity(out).config
    assert config.preset == "finetune"
    assert config.model == bridge.load(source).config
    assert bridge.load(out).tokenizer().vocab_size == 257
    trained, begun = (read_metrics(run)[-1 - last]["val_loss"] for run, last in ((copy / "run", 0), (out, 1)))
    assert abs(trained - begun) < 0.5  # random weights have 5.5; the windows differ
    assert config.tokenizer == "init-from"
    shutil.rmtree(source)
    again = ("train", "--resume", "--out", out, "--cache", copy / "cache")
    assert run(*again)[0] == 0
    stored = json.loads((out / "run.json").read_text())
    stored["config"]["tokenizer"] = "gpt2"  # as stored by runs from before "init-from" existed
    (out / "run.json").write_text(json.dumps(stored))
    assert run(*again)[0] == 0
    code, _, errors = run(*again, "--tokenizer", "characters", "--accept-changes")
    assert (code, "is not the tokenizer of" in errors) == (2, True)


QUICK = ("--max-steps", 1, "--batch-size", 2, "--seq-len", 8, "--eval-batches", 1, "--sample-tokens", 0)


def test_the_export_of_fine_tuning_keeps_every_companion_and_every_id(tmp_path: Path) -> None:
    """Special and ordinary added tokens, roles, a chat template, generation settings, and the ids in config.json."""
    rows = 450
    source = huggingface_directory(tmp_path / "source", replace(RECIPE.model, vocab_size=rows, bias=True))
    KINDS["new_style_with_added_tokens"](source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    (source / "generation_config.json").write_text('{"eos_token_id": 421, "pad_token_id": 422, "top_k": 3}')
    ids = {"bos_token_id": 420, "eos_token_id": [421, 420], "pad_token_id": 422, "tokenizer_class": "GPT2Tokenizer"}
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **ids}))
    out = tmp_path / "run"
    places = ("--data", write_text(tmp_path), "--cache", tmp_path / "cache", "--out", out)
    assert run("train", "--init-from", source, *places, *QUICK)[0] == 0
    assert run("train", "--resume", "--out", out, "--cache", tmp_path / "cache")[0] == 0
    for path in source.rglob("*"):
        if path.is_file() and path.name not in ("config.json", "model.safetensors"):
            assert (out / "export" / path.relative_to(source)).read_bytes() == path.read_bytes()
    exported = json.loads((out / "export" / "config.json").read_text())
    assert {name: exported[name] for name in ids} == ids
    assert bridge.load(out).tokenizer().fingerprint == bridge.load(source).tokenizer().fingerprint


def test_a_checkpoint_without_a_tokenizer_needs_the_flag(tmp_path: Path) -> None:
    source = huggingface_directory(tmp_path / "source", replace(RECIPE.model, vocab_size=300, bias=True))
    places = ("--data", write_text(tmp_path), "--cache", tmp_path / "cache", "--out", tmp_path / "run")
    code, _, errors = run("train", "--init-from", source, *places, *QUICK)
    assert (code, "give a tokenizer" in errors) == (2, True)
    assert run("train", "--init-from", source, *places, *QUICK, "--tokenizer", "bytes")[0] == 0
    made = bridge.load(tmp_path / "run")
    assert (made.config.vocab_size, made.tokenizer().vocab_size) == (300, 257)
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # as if the run had stopped before its first checkpoint
    assert run("train", "--resume", "--cache", tmp_path / "cache", "--out", tmp_path / "run")[0] == 0
    assert bridge.load(tmp_path / "run").tokenizer().vocab_size == 257


@pytest.mark.parametrize("tokenizer", ["bytes", "characters"])
def test_a_tokenizer_with_ids_beyond_the_vocabulary_is_refused(tmp_path: Path, tokenizer: str) -> None:
    source = huggingface_directory(tmp_path / "source", replace(RECIPE.model, vocab_size=20, bias=True))
    places = ("--data", write_text(tmp_path), "--cache", tmp_path / "cache", "--out", tmp_path / "run")
    code, _, errors = run("train", "--init-from", source, *places, *QUICK, "--tokenizer", tokenizer)
    assert code == 2
    assert re.search(r"has ids up to \d+, and the vocabulary of '.*source' has 20 rows", errors)
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_the_checkpoints_own_tokenizer_may_be_named(tmp_path: Path) -> None:
    places = ("--data", write_text(tmp_path), "--cache", tmp_path / "cache", "--out", tmp_path / "run")
    code, _, errors = run("train", "--init-from", "bundled", *places, *QUICK, "--tokenizer", bridge.BUNDLED)
    assert (code, errors) == (0, "")


def test_divergence_exits_with_1_and_names_the_step(trained: Path, tmp_path: Path) -> None:
    places = ("--data", trained / "text.txt", "--cache", trained / "cache", "--out", tmp_path / "run")
    code, _, errors = run(
        "train",
        *places,
        *flags_of(replace(RECIPE, optimizer=replace(RECIPE.optimizer, learning_rate=1e30)), PRESETS["nano"]),
    )
    assert code == 1
    assert errors.startswith("gpt2: step 2: loss")
    assert "--learning-rate" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "nano"),
        (["--out", "x"], "nano"),
        (["--preset", "gpt2-xl", "--out", "x"], "gpt2-xl"),
        (["--out", "x", "--preset=shakespeare-char"], "shakespeare-char"),
        (["--resume", "--out", "nowhere"], "nano"),
        (["--batch-size", "2", "--no-scan", "--preset", "gpt2", "--sample-prompt=--preset"], "gpt2"),
    ],
)
def test_the_preset_gives_the_defaults(arguments: list[str], expected: str) -> None:
    assert default_config("train", arguments) == PRESETS[expected]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--init-from", "gpt2"], "finetune"),
        (["--init-from=gpt2"], "finetune"),
        (["--init_from", "gpt2"], "finetune"),
        (["--init-from", "gpt2", "--preset", "nano"], "nano"),
    ],
)
def test_with_a_checkpoint_the_default_tokenizer_is_its_own(arguments: list[str], expected: str) -> None:
    assert default_config("train", arguments) == replace(PRESETS[expected], init_from="gpt2", tokenizer="init-from")


def test_a_preset_without_a_name_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        default_config("train", ["--preset"])
    assert ended.value.code == 2
    assert "--preset" in capsys.readouterr().err


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "no directory": ((), "--out"),
    "unknown preset": (("--out", "{out}", "--preset", "tiny"), "--preset tiny: must be one of nano"),
    "out of range": (("--out", "{out}", "--max-steps", "0", "--beta1", "2"), "max_steps=0"),
    "an invalid model": (("--out", "{out}", "--n-head", "5"), "n_head"),
    "an unknown optimizer": (("--out", "{out}", "--optimizer", "sgd"), "sgd"),
    "not a number": (("--out", "{out}", "--max-steps", "many"), "many"),
    "unknown flag": (("--out", "{out}", "--lr", "1"), "--lr"),
    "data without a name": (("--out", "{out}", "--data", ""), "empty name"),
    "missing data": (("--out", "{out}", "--data", "{tmp}/nowhere"), "nowhere"),
    "unknown tokenizer": (("--out", "{out}", "--data", "{text}", "--tokenizer", "words"), "words"),
    "missing checkpoint": (("--out", "{out}", "--init-from", "{tmp}/nowhere"), "nowhere"),
    "more tokens than positions": (
        ("--out", "{out}", "--data", "{text}", "--seq-len", "999", "--tokenizer", "bytes"),
        "seq_len=999",
    ),
    "existing file": (("--out", "{text}", "--data", "{text}", "--tokenizer", "bytes"), "is not a run"),
    "unwritable json": (("--out", "{out}", "--json", "{tmp}/nowhere/x.json"), "cannot write"),
    "init-from without a checkpoint": (
        ("--out", "{out}", "--tokenizer", "init-from"),
        "init_from, which is not given",
    ),
    **{
        f"no effect of {flags[0]}": (("--out", "{out}", "--data", "{text}", *flags), f"{flags[0]}: has no effect")
        for flags in (
            ("--accept-changes",),
            ("--validation-fraction", "0.2", "--validation-data", "{text}"),
            ("--muon-learning-rate", "0.1"),
            ("--muon-momentum", "0.5"),
            ("--muon-weight-decay", "0.5"),
            ("--min-learning-rate", "1e-5", "--schedule", "constant"),
            ("--decay-steps", "900", "--schedule", "wsd"),
            ("--decay-fraction", "0.5"),
            ("--sample-prompt", "x", "--sample-tokens", "0"),
            ("--lora-alpha", "8"),
            ("--lora-targets", "c_fc"),
        )
    },
    "size determined by the tokenizer": (
        ("--out", "{out}", "--data", "{text}", "--tokenizer", "bytes", "--vocab-size", "300"),
        "--vocab-size '300': has no effect, because the tokenizer sets it to 257",
    ),
    "size determined by the checkpoint": (
        ("--out", "{out}", "--data", "{text}", "--init-from", "bundled", "--n-layer", "7"),
        "--n-layer '7': has no effect, because --init-from sets it to 5",
    ),
    "tokenizer other than the checkpoint's": (
        ("--out", "{out}", "--data", "{text}", "--init-from", "bundled", "--tokenizer", "bytes"),
        "--tokenizer 'bytes': is not the tokenizer of",
    ),
    "prompt with an unknown character": (
        ("--out", "{out}", "--data", "{text}", "--tokenizer", "characters", "--sample-prompt", "é"),
        "sample_prompt",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_exits_with_2_and_writes_nothing(name: str, tmp_path: Path) -> None:
    arguments, message = BAD[name]
    places = {"tmp": tmp_path, "out": tmp_path / "run", "text": write_text(tmp_path)}
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    code, _, errors = run("train", "--cache", tmp_path / "cache", *(a.format(**places) for a in arguments))
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors
    assert "tyro" not in errors
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("name", ["run", "text.txt", "notes"])
def test_a_directory_that_cannot_be_used_is_refused_before_the_data_is_read(copy: Path, name: str) -> None:
    (copy / "notes").mkdir()
    (copy / "notes" / "mine.txt").write_text("mine")
    before = files(copy)
    code, printed, errors = run("train", "--out", copy / name, "--data", copy / "text.txt", "--cache", copy / "new")
    expected = "is a run; continue it with --resume" if name == "run" else "exists and is not a run; choose another"
    assert (code, printed) == (2, "") and expected in errors
    assert files(copy) == before and not (copy / "new").exists()


def test_flags_that_have_no_effect_on_token_files_are_refused(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for name in ("train.bin", "val.bin"):
        np.tile(np.arange(50, dtype=np.uint16), 20).tofile(data / name)
    flags = ("--out", out, "--tokenizer", "none", "--cache", tmp_path / "cache", "--validation-fraction", "0.2")
    code, _, errors = run("train", "--data", data, *flags)
    assert code == 2
    assert "--cache: has no effect, because token files are not tokenised; leave it out" in errors
    assert "--validation-fraction: has no effect, because --data has validation files; leave it out" in errors
    code, _, errors = run("train", "--data", data / "train.bin", *flags)
    assert code == 2 and "--cache: has no effect" in errors and "--validation-fraction" not in errors
    assert not out.exists() and not (tmp_path / "cache").exists()


def test_resume_without_a_run_starts_one_on_token_files(tmp_path: Path) -> None:
    np.tile(np.arange(50, dtype=np.uint16), 20).tofile(tmp_path / "train.bin")
    out = tmp_path / "run"
    flags = flags_of(replace(RECIPE, tokenizer="none", sample_tokens=5), PRESETS["nano"])
    code, printed, errors = run("train", "--resume", "--data", tmp_path / "train.bin", "--out", out, *flags)
    assert (code, errors) == (0, "")
    assert f"no run at {out}; starting a new one" in printed
    assert bridge.load(out).config.vocab_size == RECIPE.model.vocab_size
    code, printed, errors = run("train", "--resume", "--out", out)
    assert (code, errors) == (0, "")
    assert "no run" not in printed


@pytest.mark.parametrize(
    "error", [MemoryError(), JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")], ids=repr
)
def test_too_little_memory_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(run_training, "run_training", fail)
    code, _, errors = run("train", "--out", tmp_path / "run")
    assert code == 2
    assert "lower --batch-size, or raise --num-microbatches" in errors


def test_too_little_text_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    places = ("--data", tmp_path / "short.txt", "--cache", tmp_path / "cache", "--out", tmp_path / "run")
    code, _, errors = run("train", *places, *RECIPE_FLAGS)
    assert code == 2
    assert "more data" in errors


def test_help_shows_every_field_and_the_presets_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # one column of boxes
    code, printed, _ = run("train", "--preset", "gpt2-large", "--help")
    assert code == 0
    for part in (TrainConfig, GPT2Config, OptimizerConfig):
        for field in fields(part):
            if field.name != "model":
                assert f"--{field.name.replace('_', '-')}" in printed, field.name
    text = " ".join(printed.replace("│", " ").split())
    for value in ("gpt2-large", "1280", "bfloat16"):
        assert f"(default: {value})" in text


@pytest.mark.parametrize("part", [TrainConfig, GPT2Config, OptimizerConfig])
def test_every_field_has_a_line_of_help(part: type) -> None:
    [definition] = ast.parse(inspect.getsource(part)).body
    assert isinstance(definition, ast.ClassDef)
    body = definition.body
    for statement, following in pairwise(body):
        if isinstance(statement, ast.AnnAssign):
            assert isinstance(following, ast.Expr), ast.unparse(statement)


# In a child process, because the signal goes to a process.


@pytest.mark.processes
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_exports_and_sets_the_exit_code(
    trained: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "run"
    changed: dict[str, Any] = {"max_steps": 100_000, "eval_every": 50_000, "checkpoint_every": 50_000}
    flags = flags_of(replace(RECIPE, **changed), PRESETS["nano"])
    places = ["--data", trained / "text.txt", "--cache", trained / "cache", "--out", out]
    command = [Path(sys.executable).with_name("gpt2"), "train", *places, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    deadline = time.monotonic() + 300
    while not any(record["step"] for record in read_metrics(out)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (code, "")
    [step] = steps(out)
    assert f"stopped by {number.name} and saved at step {step}; continue with --resume" in printed
    assert bridge.load(out / "export").config == replace(RECIPE.model, bias=True)
    assert (out / "loss.png").exists()

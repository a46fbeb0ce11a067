"""`gpt2 train` on records: a whole run for each schema, resuming, and the preview."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.chats import write_chat_tokenizer
from support.commands import run as gpt2
from support.training_runs import all_weights, records

import bridge
from gpt2_jax.training.run.identity import stored_identity

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZES = "--n-layer 1 --n-embd 24 --n-head 2 --n-positions 64 --seq-len 48 --batch-size 4 --warmup-steps 1 --max-steps 4"
REPORTS = "--eval-every 2 --eval-batches 1 --checkpoint-every 2 --log-every 1 --sample-tokens 0"
USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": f"line {i} of many"} for i in range(200)],
    "completion": [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(20)],
    "messages": [{"messages": [USER, {**REPLY, "content": f"Ho {i}"}]} for i in range(20)],
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, rows in ROWS.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("tokenizer").mkdir()
    write_chat_tokenizer(Path("tokenizer"))
    return tmp_path


def train(data: str, *flags: object) -> int:
    tokenizer = "tokenizer" if data.startswith("messages") else "bytes"
    shared = ("--data", data, "--tokenizer", tokenizer, "--out", "run", "--cache", "cache")
    return gpt2("train", *shared, *SIZES.split(), *REPORTS.split(), *flags)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ROWS)
def test_a_run_on_each_kind(here: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(f"{kind}.jsonl") == 0
    config = stored_identity(Path("run")).config
    assert config.examples == ("stream" if kind == "text" else "documents")
    found = records(Path("run"))
    assert [r["step"] for r in found] == [0, 1, 2, 3, 4] and found[-1]["val_loss"] < found[0]["val_loss"]
    assert bridge.load("run/export").config.n_layer == 1
    assert f"{kind}.jsonl: " in capsys.readouterr().out


def test_records_with_completions_may_be_a_stream(here: Path) -> None:
    assert train("completion.jsonl", "--examples", "stream", "--seq-len", 8, "--max-steps", 1) == 0
    assert stored_identity(Path("run")).config.examples == "stream"


@pytest.mark.thorough
def test_a_resumed_run_equals_an_uninterrupted_one(here: Path) -> None:
    flags = ("--schedule", "constant")
    assert train("completion.jsonl", *flags) == 0
    whole = all_weights(Path("run/checkpoints/4"))
    Path("run").rename("whole")
    assert train("completion.jsonl", *flags, "--max-steps", 2) == 0
    assert train("completion.jsonl", *flags, "--resume", "--accept-changes") == 0
    again = all_weights(Path("run/checkpoints/4"))
    assert again.keys() == whole.keys()
    for name, array in whole.items():
        np.testing.assert_allclose(again[name], array, rtol=1e-5, atol=1e-6)


def test_changed_records_are_not_resumed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("completion.jsonl", "--max-steps", 2) == 0
    text = Path("completion.jsonl").read_text()
    Path("completion.jsonl").write_text(text.replace(" + 1 =", " + 1", 1).replace('n": " ', 'n": "= ', 1))
    assert train("completion.jsonl", "--max-steps", 2, "--resume") == 2
    assert "data: the tokens are not the same as when the run started" in capsys.readouterr().err


def test_a_completion_that_does_not_fit_is_named_or_counted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("completion.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "a" * 40, "completion": "b" * 40}) + "\n")
    assert train("completion.jsonl") == 2
    printed = capsys.readouterr().err
    assert "completion.jsonl', line 21: has 81 tokens, and an example at most 49; raise --seq-len" in printed
    assert "Traceback" not in printed and not Path("run").exists()
    assert train("completion.jsonl", "--skip-bad-records", "--max-steps", 1) == 0
    assert "1 record was left out: 1 longer than --seq-len" in capsys.readouterr().out.replace("\n", " ")


def test_the_preview_shows_what_counts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("messages.jsonl", "--show-examples", 2) == 0
    printed = capsys.readouterr().out
    assert "example 2: " in printed and "example 3: " not in printed
    assert "<|im_start|>|u|s|e|r|\\n|H|i|<|im_end|>" in printed
    assert "|a|s|s|i|s|t|a|n|t|\\n[H][o][ ]" in printed and "[<|im_end|>][\\n]" in printed
    assert not Path("run").exists()
    assert train("text.jsonl", "--show-examples", 1) == 0
    assert "example 1: 49 tokens, of which 48 count" in capsys.readouterr().out


def test_the_preview_excludes_flags_without_effect(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("text.jsonl", "--show-examples", 1, "--json", "a.json") == 2
    assert "--json: has no effect with --show-examples" in capsys.readouterr().err
    assert train("text.jsonl", "--show-examples", 0) == 2
    assert "--show-examples 0: must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("--text-field", "a", "--prompt-field", "b"), ("--text-field", "nothing")])
def test_wrong_names_of_fields_are_refused(
    here: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("text.jsonl", *flags) == 2
    assert ("one kind of records" if len(flags) > 2 else "has no field 'nothing'") in capsys.readouterr().err


def test_a_mixture_reports_the_loss_of_each_source_and_resumes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = (("prose", "text.jsonl", 3), ("pairs", "completion.jsonl", 1))
    tables = (f"[{name}]\npath = '{path}'\nweight = {weight}\n" for name, path, weight in sources)
    Path("mixture.toml").write_text("".join(tables))
    flags = ("--examples", "packed")
    assert train("mixture.toml", *flags, "--max-steps", 2) == 0
    assert train("mixture.toml", *flags, "--resume", "--accept-changes") == 0
    evaluated = [record for record in records(Path("run")) if "val_loss" in record]
    assert [record["step"] for record in evaluated] == [0, 2, 4]
    for record in evaluated:
        assert record["val_loss"] == record["val_loss/prose"] != record["val_loss/pairs"]
    Path("mixture.toml").write_text(Path("mixture.toml").read_text().replace("weight = 3", "weight = 2"))
    assert train("mixture.toml", *flags, "--resume") == 2
    assert "the tokens are not the same as when the run started" in capsys.readouterr().err

"""`--drop-extra-heads` and `--base`, on every verb that reads a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import CONFIG, needs_torch, run
from support.models import random_checkpoint, random_state
from support.tokenizers_for_tests import write_byte_tokenizer

import bridge
from bridge import BridgeError, Checkpoint, LoRA
from bridge.containers.safetensors import write_file
from bridge.storage.tensors import LazyTensorMap
from gpt2_jax.cli import run_training as train_verb
from gpt2_jax.training import TrainConfig

LEFT_OUT = "tensors of heads for other tasks were left out: 'score.weight'"
FLAG = "--drop-extra-heads"


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A checkpoint with a classification head, and a tokenizer."""
    path = tmp_path / "classifier"
    path.mkdir()
    state = {**random_state(CONFIG), "score.weight": np.ones((2, CONFIG.n_embd), np.float32)}
    (path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    write_file(path / "model.safetensors", LazyTensorMap.of(state), {"format": "pt"})
    write_byte_tokenizer(path)
    return path


def facts(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("verb", ["inspect", "eval", "generate", "convert", "train"])
def test_without_the_flag_the_error_names_the_tensor_and_the_flag(
    verb: str, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: dict[str, tuple[object, ...]] = {
        "convert": (classifier, tmp_path / "out", "--to", "flax"),
        "train": ("--init-from", classifier, "--out", tmp_path / "out"),
    }
    before = sorted(tmp_path.rglob("*"))
    assert run(verb, *arguments.get(verb, (classifier,))) == 2
    shown = capsys.readouterr().err
    assert "'score.weight' is not a parameter of this model" in shown and FLAG in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_inspect_and_convert_name_what_is_left_out(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", classifier, FLAG, "--json", tmp_path / "facts.json") == 0
    assert LEFT_OUT in facts(tmp_path / "facts.json")["diagnostics"]
    capsys.readouterr()
    assert run("convert", classifier, tmp_path / "out", "--to", "huggingface", FLAG) == 0
    assert f"warning: {LEFT_OUT}" in capsys.readouterr().out
    converted = bridge.load(tmp_path / "out")
    assert bridge.fingerprint(converted.tensors) == bridge.fingerprint(random_state(CONFIG))


@needs_torch
def test_verify_names_what_is_left_out(classifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", classifier, FLAG, "--checks", "round-trip", "--seq-len", 4) == 0
    assert f"warning: {LEFT_OUT}" in capsys.readouterr().out


@pytest.mark.thorough
@needs_torch
def test_verify_checks_the_head_unless_it_is_left_out(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (classifier, "--checks", "classification", "--seq-len", 4)
    assert run("verify", *arguments, "--json", tmp_path / "report.json") == 0
    report = facts(tmp_path / "report.json")
    assert report["details"]["model"].endswith("and a classification head of 2 classes")
    assert [check["name"] for check in report["checks"]] == ["classification"]
    assert run("verify", *arguments, FLAG) == 1
    assert "Nothing was checked. Skipped: classification." in capsys.readouterr().out
    assert run("verify", *arguments, "--untrained") == 2
    assert "--untrained: has no effect without the check of predictions" in capsys.readouterr().err


def test_eval_and_generate_name_what_is_left_out_on_standard_error(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("We predict this text.")
    assert run("eval", classifier, FLAG, "--data", tmp_path / "text.txt") == 0
    assert capsys.readouterr().err == f"warning: {LEFT_OUT}\n"
    assert run("generate", classifier, "We", FLAG, "--max-new-tokens", 2) == 0
    assert capsys.readouterr().err == f"warning: {LEFT_OUT}\n"


def test_train_starts_from_the_language_model(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[Checkpoint] = []

    def stop(config: TrainConfig, out: Path, data: Any, *, init_from: Checkpoint, **_: Any) -> None:
        assert config.drop_extra_heads
        begun.append(init_from)
        raise BridgeError("enough")

    monkeypatch.setattr(train_verb, "train", stop)
    (tmp_path / "text.txt").write_text("We train on this text.\n" * 200)
    places = ("--data", tmp_path / "text.txt", "--cache", tmp_path / "cache", "--out", tmp_path / "run", "--seq-len", 8)
    assert run("train", "--init-from", classifier, FLAG, *places) == 2
    assert f"warning: {LEFT_OUT}" in capsys.readouterr().out
    assert bridge.fingerprint(begun[0].tensors) == bridge.fingerprint(random_state(CONFIG))


def test_train_without_a_checkpoint_refuses_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--out", tmp_path / "run", FLAG) == 2
    assert "drop_extra_heads: is only for --init-from" in capsys.readouterr().err


MERGED = "a LoRA adapter for 'me/base' was merged into 1 matrices of "


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA adapter for the checkpoint of `model`."""
    rng = np.random.default_rng(0)
    shapes = (4, CONFIG.n_embd), (3 * CONFIG.n_embd, 4)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    bridge.save_lora(LoRA.of({"h.0.attn.c_attn": (a, b)}, alpha=8), tmp_path / "adapter", base_model="me/base")
    return tmp_path / "adapter"


@pytest.mark.parametrize("verb", ["inspect", "verify", "eval", "generate", "convert", "train"])
def test_without_the_base_the_error_names_it_and_the_flag(
    verb: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if verb == "verify":
        pytest.importorskip("torch")
    arguments: dict[str, tuple[object, ...]] = {
        "convert": (adapter, tmp_path / "out", "--to", "flax"),
        "train": ("--init-from", adapter, "--out", tmp_path / "out"),
    }
    before = sorted(tmp_path.rglob("*"))
    assert run(verb, *arguments.get(verb, (adapter,))) == 2
    shown = capsys.readouterr().err
    assert "is an adapter for 'me/base' and not a model; give that model too: --base 'me/base'" in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_inspect_eval_and_generate_read_the_merged_model(
    adapter: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("We predict this text.")
    assert run("convert", adapter, tmp_path / "merged", "--to", "huggingface", "--base", model) == 0
    assert run("inspect", adapter, "--base", model, "--json", tmp_path / "facts.json") == 0
    assert facts(tmp_path / "facts.json")["fingerprint"] == bridge.fingerprint(bridge.load(tmp_path / "merged").tensors)
    assert MERGED in facts(tmp_path / "facts.json")["diagnostics"][0]
    found = {}
    sources = {"adapter": (adapter, "--base", model), "merged": (tmp_path / "merged",), "base": (model,)}
    for name, source in sources.items():
        capsys.readouterr()
        json_file = tmp_path / f"{name}.json"
        assert run("eval", *source, "--data", tmp_path / "text.txt", "--json", json_file) == 0
        assert (MERGED in capsys.readouterr().err) == (name == "adapter")
        found[name] = facts(json_file)["loss"]
    assert found["adapter"] == found["merged"] != found["base"]
    assert run("generate", adapter, "We", "--base", model, "--max-new-tokens", 2) == 0
    assert MERGED in capsys.readouterr().err


@needs_torch
def test_verify_reads_the_merged_model(adapter: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", adapter, "--base", model, "--checks", "logits", "round-trip", "--seq-len", 4) == 0
    assert f"warning: {MERGED}" in capsys.readouterr().out


def test_train_starts_from_the_merged_model(
    adapter: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[Checkpoint] = []

    def stop(config: TrainConfig, out: Path, data: Any, *, init_from: Checkpoint, **_: Any) -> None:
        begun.append(init_from)
        raise BridgeError("enough")

    monkeypatch.setattr(train_verb, "train", stop)
    (tmp_path / "text.txt").write_text("We train on this text.\n" * 200)
    places = ("--data", tmp_path / "text.txt", "--cache", tmp_path / "cache", "--out", tmp_path / "run", "--seq-len", 8)
    assert run("train", "--init-from", adapter, "--base", model, *places) == 2
    assert f"warning: {MERGED}" in capsys.readouterr().out
    before = random_checkpoint(CONFIG).tensors["h.0.attn.c_attn.weight"]
    assert np.abs(begun[0].tensors["h.0.attn.c_attn.weight"] - before).max() > 1


def test_a_base_without_an_adapter_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", model, "--base", model) == 2
    assert "this is a model and not an adapter; leave the argument (--base) out" in capsys.readouterr().err
    assert run("train", "--out", tmp_path / "run", "--base", model) == 2
    assert "is only for --init-from" in capsys.readouterr().err

"""`load` and `save`: recognised formats, errors for other files, and the Hugging Face hub."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from support.models import SMALLEST, TINY, config_for, huggingface_directory, random_checkpoint
from support.tokenizers_for_tests import write_byte_tokenizer

import bridge
from bridge import BridgeError, CheckpointError, TokenizerError
from bridge.formats import FORMATS, WRITABLE


def message(source: str | Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        bridge.load(source)
    assert "\n" not in str(caught.value), "one clear line"
    return str(caught.value)


# Paths


@pytest.mark.parametrize(
    "source", ["./no-such-dir", "no/such/dir", "/no/such", "no such", "no\0such", "a\nb", "x" * 300 + "/."]
)
def test_a_path_that_does_not_exist_is_named(source: str) -> None:
    assert message(source).endswith("does not exist")


def test_an_unknown_path_object_is_named(tmp_path: Path) -> None:
    assert message(tmp_path / "gone") == f"'{tmp_path / 'gone'}' does not exist"


def test_an_unknown_file_is_refused(tmp_path: Path) -> None:
    for content, expected in {
        b"": "it is empty",
        b"weights!": "its first bytes match no supported format",
        b"version https://git-lfs.github.com/spec/v1\noid": "a git-LFS pointer, not the weights",
        b"<!DOCTYPE html><html>": "an HTML page, not weights",
    }.items():
        (tmp_path / "model.bin").write_bytes(content)
        assert expected in message(tmp_path / "model.bin")


def test_the_weights_file_loads_like_its_directory(tmp_path: Path) -> None:
    path = huggingface_directory(tmp_path / "model")
    (path / "model.safetensors").rename(path / "any-name")
    checkpoint = bridge.load(path / "any-name")
    assert (checkpoint.format, checkpoint.path, checkpoint.config) == ("huggingface", path, TINY)
    (path / "config.json").unlink()
    assert "holds tensors, but there is no config.json beside it" in message(path / "any-name")


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    path = huggingface_directory(tmp_path / "model")
    (path / "config.json").unlink()
    assert message(path).endswith(
        "it has 'model.safetensors', but no config.json; copy the model's config.json beside the weights"
    )


def test_weights_under_other_names_are_listed(tmp_path: Path) -> None:
    path = huggingface_directory(tmp_path / "model")
    shutil.copy(path / "model.safetensors", path / "b.safetensors")
    (path / "model.safetensors").rename(path / "a.safetensors")
    assert "it has 'a.safetensors', 'b.safetensors', which are not names of weights; give a file" in message(path)
    assert bridge.load(path / "a.safetensors").config == TINY


def test_a_directory_of_checkpoints_lists_them(tmp_path: Path) -> None:
    for name in "abcdefg":
        huggingface_directory(tmp_path / name, SMALLEST)
    found = message(tmp_path)
    assert "it holds the checkpoints 'a', 'b', 'c', 'd', 'e' and 2 more; give one of them" in found
    assert str(tmp_path / "a") in found


def test_a_directory_without_weights_lists_the_expected_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf()))
    assert "neither config.json with weights beside it (model.safetensors, pytorch_model.bin," in message(tmp_path)


@pytest.mark.timeout(10)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "flax_model.safetensors", "."])
def test_a_fifo_in_the_place_of_a_file_does_not_hang(tmp_path: Path, name: str) -> None:
    path = huggingface_directory(tmp_path / "model")
    if name == ".":
        path = tmp_path / "fifo"
        os.mkfifo(path)
    else:
        (path / name).unlink(missing_ok=True)
        os.mkfifo(path / name)
        (path / "model.safetensors").unlink(missing_ok=True)
    message(path)


@pytest.mark.parametrize("format", WRITABLE)
def test_every_format_recognises_its_own_files(tmp_path: Path, format: str) -> None:
    bridge.save(random_checkpoint(config_for(format)), tmp_path / "out", format=format)
    assert bridge.load(tmp_path / "out").format == format
    assert bridge.load(str(tmp_path / "out")).path == tmp_path / "out"


def test_no_format_raises_while_recognising_a_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path, tmp_path / "gone", tmp_path / "file", Path("/dev/null"), Path("a\0b")):
        assert not any(format.find(path) for format in FORMATS.values())


def test_loading_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = huggingface_directory(tmp_path / "model")

    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("bridge.storage.stored_file.aligned_empty", refuse)
    checkpoint = bridge.load(path)
    with pytest.raises(AssertionError, match="was read"):
        checkpoint.tensors["wpe.weight"]


# The Hugging Face hub


def test_a_hub_id_offline_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("Max retries exceeded\nwith url: ...")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    said = message("someone/tiny-gpt2")
    assert "'someone/tiny-gpt2' is not a local path" in said
    assert "(ConnectionError); check the name and the connection" in said


@pytest.mark.parametrize("source", ["gpt2", "someone/tiny-gpt2"])
def test_without_huggingface_hub_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'gpt2-bridge[hub]'" in message(source)


def test_a_hub_id_is_downloaded_without_code_or_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(huggingface_directory(tmp_path / "snapshot"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    checkpoint = bridge.load("someone/tiny-gpt2")
    assert checkpoint.config == TINY
    assert checkpoint.path == tmp_path / "snapshot"
    assert asked["repo_id"] == "someone/tiny-gpt2"
    companions = {"tokenizer.json", "vocab.json", "merges.txt", "meta.pkl", "additional_chat_templates/*.jinja"}
    assert companions | {"config.json", "*.safetensors"} <= {*asked["allow_patterns"]}
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in asked["allow_patterns"])


def test_other_weights_are_downloaded_only_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repository `gpt2` has the same weights in seven forms. Only one is downloaded."""
    bridge.save(random_checkpoint(), tmp_path / "snapshot", format="flax_msgpack")
    asked = []

    def download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path / ("snapshot" if "flax_model*.msgpack" in allow_patterns else "empty"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert bridge.load("someone/tiny-gpt2").format == "flax_msgpack"
    kinds = ["*.safetensors", "pytorch_model*.bin", "flax_model*.msgpack"]
    assert [[kind in patterns for kind in kinds] for patterns in asked] == np.eye(3, dtype=bool).tolist()


def test_a_local_directory_takes_precedence_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    huggingface_directory(tmp_path / "gpt2")
    assert bridge.load("gpt2").config == TINY


# Saving


def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"format 'onnx' is not one of {', '.join(WRITABLE)}"):
        bridge.save(random_checkpoint(), tmp_path / "out", format="onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", WRITABLE)
def test_tokenizer_and_generation_files_are_copied(tmp_path: Path, format: str) -> None:
    source = huggingface_directory(tmp_path / "source", config_for(format))
    carried = ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    carried += ["added_tokens.json", "generation_config.json"]
    for name in [*carried, "modeling_evil.py", "training_args.bin"]:
        (source / name).write_text(f'{{"contents of": "{name}"}}\r\n')
    bridge.save(bridge.load(source), tmp_path / "out", format=format)
    assert {file.name for file in (tmp_path / "out").iterdir()} >= set(carried)
    assert all((tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in carried)
    assert not (tmp_path / "out" / "modeling_evil.py").exists()
    assert not (tmp_path / "out" / "training_args.bin").exists()


def test_a_checkpoint_in_memory_has_no_tokenizer() -> None:
    with pytest.raises(TokenizerError, match="in memory has no tokenizer"):
        random_checkpoint().tokenizer()


def test_every_error_is_a_bridge_error_and_a_value_error() -> None:
    for error in (CheckpointError, TokenizerError, bridge.ConfigError, bridge.ConversionError):
        assert issubclass(error, BridgeError) and issubclass(error, ValueError)


def test_tensors_are_read_after_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_directory(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    checkpoint = bridge.load("model")
    monkeypatch.chdir("/")
    assert checkpoint.tensors["wpe.weight"].shape == (40, 48)


def test_a_setting_given_twice_is_refused(tmp_path: Path) -> None:
    path = huggingface_directory(tmp_path / "model")
    (path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 5, "n_layer": 6}')
    with pytest.raises(CheckpointError, match="'n_layer' appears twice"):
        bridge.load(path)


def test_the_tokenizer_is_found_after_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_byte_tokenizer(huggingface_directory(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    checkpoint = bridge.load("model")
    monkeypatch.chdir("/")
    assert checkpoint.tokenizer().encode("We") == [87, 101]
    bridge.save(checkpoint, tmp_path / "copy", format="flax")
    assert (tmp_path / "copy" / "vocab.json").exists()


def test_arrays_in_memory_keep_tokenizer_and_harmless_fields(tmp_path: Path) -> None:
    write_byte_tokenizer(huggingface_directory(tmp_path / "model"))
    loaded = replace(bridge.load(tmp_path / "model"), extra={"my_run": 7})
    trained = bridge.Checkpoint.of(dict(loaded.tensors), loaded.config, like=loaded)
    bridge.save(trained, tmp_path / "trained", format="huggingface")
    assert bridge.load(tmp_path / "trained").extra["my_run"] == 7
    assert bridge.load(tmp_path / "trained").tokenizer().encode("We") == [87, 101]


def test_cyclic_links_and_an_empty_source_are_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(BridgeError):
        bridge.save(random_checkpoint(), tmp_path / "loop", format="flax")
    with pytest.raises(CheckpointError, match="source is empty"):
        bridge.load("")


def test_shards_of_no_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="max_shard_bytes=0"):
        bridge.save(random_checkpoint(), tmp_path / "out", format="huggingface", max_shard_bytes=0)
    assert not (tmp_path / "out").exists()

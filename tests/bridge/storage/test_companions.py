"""Companions that are links out of the directory, special files, or too large are rejected and never copied."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import run
from support.models import config_for, random_checkpoint
from support.refusals import MOST_BYTES, MOST_SECONDS

import bridge
from bridge import BridgeError, CheckpointError
from bridge.formats import WRITABLE
from bridge.formats.directory import read_json
from bridge.storage.companions import MOST_SETTINGS_BYTES, read_companion
from bridge.tokenizers.loading import TOKENIZER_FILES

SECRET = '{"secret": "correct horse battery staple"}'
COPIED = ("generation_config.json", *TOKENIZER_FILES)


def checkpoint_directory(path: Path, format: str = "huggingface") -> Path:
    bridge.save(random_checkpoint(config_for(format)), path, format=format)
    return path


def assert_not_exported(source: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Assert that `bridge.save` and `gpt2 convert` reject `source`, name the companion, and stay within the budget."""
    target = source.parent / "exported"
    started = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(BridgeError, match=message) as caught:
            bridge.save(bridge.load(source), target, format="flax")
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 2 * MOST_SECONDS, "tracing doubles the time"
    assert name in str(caught.value)
    assert str(caught.value).replace("\n", "").isprintable()
    there = sorted(source.parent.iterdir())
    capsys.readouterr()
    assert run("convert", source, target, "--to", "flax") == 2
    printed = capsys.readouterr().err
    assert printed.startswith("gpt2: ") and name in printed and "Traceback" not in printed
    assert sorted(source.parent.iterdir()) == there, "nothing is left behind"
    assert "battery staple" not in printed


# Links


@pytest.mark.sampled(5)
@pytest.mark.parametrize("spelling", ["absolute", "relative", "through a directory", "through another link"])
@pytest.mark.parametrize("name", COPIED)
def test_a_link_out_of_the_directory_is_not_copied(
    tmp_path: Path, name: str, spelling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint_directory(tmp_path / "model")
    secret = tmp_path / "secret.json"
    secret.write_text(SECRET)
    (tmp_path / "model" / "inside").symlink_to(tmp_path)
    (tmp_path / "model" / "between").symlink_to(secret)
    (source / name).symlink_to(
        {
            "absolute": secret,
            "relative": Path("../secret.json"),
            "through a directory": Path("inside/secret.json"),
            "through another link": Path("between"),
        }[spelling]
    )
    assert_not_exported(source, name, "is a link out of the checkpoint's directory; replace it", capsys)


@pytest.mark.parametrize("format", WRITABLE)
def test_every_format_refuses_links_out_of_the_directory(
    tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("generation_config.json", "config.json")):
        source = checkpoint_directory(tmp_path / str(number) / "model", format)
        moved = tmp_path / str(number) / "elsewhere.json"
        if (source / name).exists():
            (source / name).rename(moved)
        else:
            moved.write_text(SECRET)
        (source / name).symlink_to(moved)
        assert_not_exported(source, name, "is a link out of", capsys)


@pytest.mark.parametrize("target", ["/etc/passwd", "/dev/zero", "/proc/self/environ", "missing.json", "config.json"])
def test_a_link_of_the_configuration_out_of_the_directory_is_refused(
    tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last two are a broken link and a link to itself."""
    source = checkpoint_directory(tmp_path / "model")
    (source / "config.json").unlink()
    (source / "config.json").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"config\.json|cannot be read as a checkpoint"):
        bridge.load(source)
    with pytest.raises(CheckpointError, match=r"config\.json' is a (link out of|broken link)"):
        bridge.load(source / "model.safetensors")


def test_a_link_to_a_file_of_the_same_directory_is_followed(tmp_path: Path) -> None:
    source = checkpoint_directory(tmp_path / "model")
    (source / "settings.json").write_text('{"temperature": 0.5}')
    (source / "generation_config.json").symlink_to("settings.json")
    bridge.save(bridge.load(source), tmp_path / "out", format="flax")
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"temperature": 0.5}'
    assert not (tmp_path / "out" / "generation_config.json").is_symlink()


@pytest.mark.parametrize("subfolder", ["", "onnx/small"])
@pytest.mark.parametrize("shared", [False, True], ids=["blobs of the repository", "blobs of the cache"])
def test_companions_in_a_hugging_face_cache_are_read_and_copied(tmp_path: Path, subfolder: str, shared: bool) -> None:
    """Since 2026, huggingface_hub stores blobs once for the whole cache. Blobs of a repository are links to them."""
    plain = checkpoint_directory(tmp_path / "plain")
    (plain / "generation_config.json").write_text('{"temperature": 0.5}')
    repository = tmp_path / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / "0123abcd" / subfolder
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(plain.iterdir()):
        blob = repository / "blobs" / f"{number:040x}"
        store = tmp_path / "hub" / "blobs" / "ab" / f"{number:064x}" if shared else blob
        store.parent.mkdir(parents=True, exist_ok=True)
        file.rename(store)
        if shared:
            blob.symlink_to(os.path.relpath(store, blob.parent))
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    bridge.save(bridge.load(snapshot), tmp_path / "out", format="flax")
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"temperature": 0.5}'


@pytest.mark.parametrize(
    "target",
    [
        "hub/models--someone--tiny/refs/main",
        "hub/models--someone--tiny/blobs/deeper/secret",
        "hub/models--other--model/blobs/secret",
        "hub/blobs/ab/secret",
        "hub/blobs/secret",
        "hub/token",
    ],
)
def test_other_files_of_a_hugging_face_cache_are_not_read(tmp_path: Path, target: str) -> None:
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / "0123abcd"
    checkpoint_directory(snapshot)
    (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / target).write_text(SECRET)
    (snapshot / "generation_config.json").symlink_to(os.path.relpath(tmp_path / target, snapshot))
    with pytest.raises(CheckpointError, match="is a link out of the checkpoint's directory"):
        bridge.save(bridge.load(snapshot), tmp_path / "out", format="flax")
    assert not (tmp_path / "out").exists()


# Special files, and files whose content does not match their name


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "directory"])
@pytest.mark.parametrize("name", COPIED)
def test_special_files_are_refused(
    tmp_path: Path, name: str, make: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint_directory(tmp_path / "model")
    make(source / name)
    assert_not_exported(source, name, "is not a regular file|cannot read", capsys)


NOT_JSON: dict[str, bytes] = {
    "empty": b"",
    "a list": b"[]",
    "cut": b'{"a": ',
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "infinite": b'{"a": 1e999}',
    "Infinity": b'{"a": [-Infinity]}',
    "NaN": b'{"a": NaN}',
    "10^400": b'{"a": 1' + b"0" * 400 + b"}",
    "10^5000": b'{"a": 1' + b"0" * 5000 + b"}",
    "a name twice": b'{"a": 1, "a": 1}',
    "a name twice, deeper": b'{"a": [{"b": 1, "b": 2}]}',
    "half a pair": b'{"a": "\\ud83d"}',
    "half a pair in a name": b'{"\\udc00": 1}',
    "deep lists": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "33 deep": b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}",
    "a page": b"<!DOCTYPE html><html></html>",
    "escape codes": b'{"\x1b[31m": 1}',
    "many lists": b'{"a": [' + b",".join([b"[]"] * 300_000) + b"]}",
    "many objects": b'{"a": [' + b",".join([b'{"a":1}'] * 120_000) + b"]}",
    "many numbers": b'{"a": [' + b",".join([b"1"] * 500_000) + b"]}",
}


@pytest.mark.parametrize("content", NOT_JSON.values(), ids=NOT_JSON)
@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_settings_that_are_not_plain_json_are_not_copied(tmp_path: Path, name: str, content: bytes) -> None:
    source = checkpoint_directory(tmp_path / "model")
    (source / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
        bridge.save(bridge.load(source), tmp_path / "out", format="flax")
    assert str(caught.value).isprintable()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", NOT_JSON.values(), ids=NOT_JSON)
def test_a_configuration_that_is_not_plain_json_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"config\.json"):
            read_json(file)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", COPIED)
@pytest.mark.parametrize("size", [20 * 10**6, 2**40], ids=["20 MB", "1 TiB"])
def test_a_large_file_is_refused_by_its_size(
    tmp_path: Path, name: str, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint_directory(tmp_path / "model")
    with open(source / name, "wb") as file:
        file.truncate(size)
    assert_not_exported(source, name, "is larger than", capsys)


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b" " * (MOST_SETTINGS_BYTES + 1))
    status = os.stat(__file__)
    monkeypatch.setattr(os, "fstat", lambda _: status)
    with pytest.raises(CheckpointError, match="is larger than 1048576 bytes"):
        read_companion(tmp_path, "config.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [("merges.txt", b"\xff\xfe"), ("vocab.bpe", b"a \xff"), ("vocab.json", b"{"), ("encoder.json", b"")],
)
def test_tokenizer_files_are_checked_before_they_are_copied(tmp_path: Path, name: str, content: bytes) -> None:
    source = checkpoint_directory(tmp_path / "model")
    (source / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}' is not (UTF-8|valid JSON)"):
        bridge.save(bridge.load(source), tmp_path / "out", format="flax")


def test_plain_settings_are_copied_byte_for_byte(tmp_path: Path) -> None:
    source = checkpoint_directory(tmp_path / "model")
    contents: dict[str, Any] = {
        "generation_config.json": {"temperature": 0.7, "eos_token_id": [1, 2], "nested": [[[[{"a": None}]]]]},
        "tokenizer_config.json": {"chat_template": "{% for m in messages %}" * 1000, "model_max_length": 10**30},
        "special_tokens_map.json": {"eos_token": "🙂", "pad_token": "\x1b"},
    }
    for name, value in contents.items():
        (source / name).write_text(json.dumps(value, indent=3))
    bridge.save(bridge.load(source), tmp_path / "out", format="flax")
    for name in contents:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()

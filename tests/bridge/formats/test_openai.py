"""OpenAI's TensorFlow checkpoints: files that TensorFlow 2.21.0 wrote (`tests/files/tensorflow-2.21.0/write.py`)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fuzz.openai import FILES, oracle, repair
from support.refusals import assert_refused
from support.tokenizers_for_tests import write_byte_tokenizer

import bridge
from bridge import BridgeError, CheckpointError, ConfigError, ConversionError, GPT2Config
from bridge.formats import WRITABLE

CONFIG = GPT2Config(vocab_size=11, n_positions=5, n_embd=8, n_layer=2, n_head=2)
DATA, INDEX = "model.ckpt.data-00000-of-00001", "model.ckpt.index"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FILES / "plain", tmp_path / "openai", ignore=shutil.ignore_patterns("*.npz")))


@pytest.mark.parametrize("sample", ["plain", "adam", "sharded"])
def test_files_of_tensorflow_are_read_bit_for_bit(sample: str) -> None:
    found = bridge.load(FILES / sample)
    assert (found.format, found.config, found.path) == ("openai", CONFIG, FILES / sample)
    assert bridge.fingerprint(found.tensors) == bridge.fingerprint(oracle(FILES / sample))
    weights = np.load(FILES / "plain" / "weights.npz")
    assert found.tensors["wte.weight"].tobytes() == weights["model/wte"].tobytes()
    assert found.tensors["h.1.attn.c_attn.weight"].tobytes() == weights["model/h1/attn/c_attn/w"][0].tobytes()
    assert found.tensors["h.0.ln_2.bias"].tobytes() == weights["model/h0/ln_2/b"].tobytes()
    assert found.diagnostics == (
        ("59 training variables, such as Adam's moments, were left out",) if sample == "adam" else ()
    )


@pytest.mark.parametrize("format", WRITABLE)
def test_conversion_to_every_format_keeps_the_fingerprint(tmp_path: Path, format: str) -> None:
    original = bridge.load(FILES / "plain")
    source = original.with_activation("gelu") if format == "nanogpt" else original
    bridge.save(source, tmp_path / "out", format=format)
    assert bridge.fingerprint(bridge.load(tmp_path / "out").tensors) == bridge.fingerprint(original.tensors)


def test_its_tokenizer_is_found(plain: Path) -> None:
    write_byte_tokenizer(plain)
    (plain / "vocab.json").rename(plain / "encoder.json")
    (plain / "merges.txt").rename(plain / "vocab.bpe")
    hparams = json.loads((plain / "hparams.json").read_text())
    with pytest.raises(bridge.TokenizerError, match="only 11"):
        bridge.load(plain).tokenizer()
    assert hparams["n_vocab"] == 11


def test_without_the_state_file_the_only_checkpoint_is_read(plain: Path) -> None:
    (plain / "checkpoint").unlink()
    assert bridge.load(plain).config == CONFIG


def test_a_state_file_with_windows_line_ends_is_read(plain: Path) -> None:
    (plain / "checkpoint").write_bytes((plain / "checkpoint").read_bytes().replace(b"\n", b"\r\n"))
    assert bridge.load(plain).config == CONFIG


def test_the_state_file_selects_the_index_and_its_directories_are_ignored(plain: Path) -> None:
    for part in ("index", "data-00000-of-00001"):
        shutil.copy(plain / f"model.ckpt.{part}", plain / f"model-900.{part}")
    (plain / "checkpoint").write_text('model_checkpoint_path: "/home/me/models/model-900"\n')
    assert bridge.load(plain).config == CONFIG


def test_opening_reads_no_tensor(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("bridge.storage.stored_file.aligned_empty", refuse)
    checkpoint = bridge.load(plain)
    with pytest.raises(AssertionError, match="was read"):
        checkpoint.tensors["wte.weight"]


# Hostile and damaged directories


def file(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes()))


def flipped(at: int) -> Callable[[bytes], bytes]:
    return lambda c: c[:at] + bytes([c[at] ^ 1]) + c[at + 1 :]


def replaced(old: bytes, new: bytes) -> Callable[[Path], object]:
    """Edit the index and update its checksums."""

    def change(path: Path) -> None:
        content = (path / INDEX).read_bytes()
        assert old in content
        (path / INDEX).write_bytes(content.replace(old, new, 1))
        repair(path)

    return change


def hparams(**changes: object) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        fields = {**json.loads((path / "hparams.json").read_text()), **changes}
        (path / "hparams.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))

    return change


def state(text: str) -> Callable[[Path], object]:
    return lambda path: (path / "checkpoint").write_text(text)


# 0x08 0x01 is header field 1, the number of data files: the first value of the index.
HEADER = b"\x00\x00\x06\x08\x01\x1a\x02\x08\x01"
MALFORMED: dict[str, tuple[Callable[[Path], object], str, type[BridgeError]]] = {
    "no data": (lambda p: (p / DATA).unlink(), f"{DATA}'", CheckpointError),
    "data empty": (file(DATA, lambda c: b""), "is damaged or truncated", CheckpointError),
    "data one byte less": (file(DATA, lambda c: c[:-1]), "is damaged or truncated", CheckpointError),
    "data one byte more": (file(DATA, lambda c: c + b"\0"), "1 bytes after the last tensor", CheckpointError),
    "data flipped": (file(DATA, flipped(700)), "does not match its checksum", CheckpointError),
    "data zeroed": (file(DATA, lambda c: bytes(len(c))), "does not match its checksum", CheckpointError),
    "data a pointer": (file(DATA, lambda c: b"version https://git-lfs"), "git-LFS pointer", CheckpointError),
    "index flipped": (file(INDEX, flipped(100)), "does not match its checksum", CheckpointError),
    "index cut in front": (file(INDEX, lambda c: c[40:]), "is damaged", CheckpointError),
    "a tail of the index": (file(INDEX, lambda c: c[-48:]), "refers to bytes outside of the file", CheckpointError),
    "a short index": (file(INDEX, lambda c: c[-20:]), "20 bytes; the index of a GPT-2 has from 48", CheckpointError),
    "big-endian": (replaced(HEADER, b"\x00\x00\x06\x08\x01\x10\x01\x18\x00"), "big-endian machine", CheckpointError),
    "no data files": (
        replaced(HEADER, b"\x00\x00\x06\x08\x00\x1a\x02\x08\x01"),
        "declares 0 data files",
        CheckpointError,
    ),
    "another file count": (replaced(HEADER, b"\x00\x00\x06\x08\x02\x1a\x02\x08\x01"), "of-00002", CheckpointError),
    "a name changed": (
        replaced(b"model/h0/attn/c_attn/b", b"model/h0/attn/c_attn/c"),
        "c_attn/b is missing",
        ConversionError,
    ),
    "layers missing": (hparams(n_layer=3), "model/h2/ln_1/g is missing", ConversionError),
    "layers too many": (hparams(n_layer=1), "'model/h1/ln_1/g' is not a parameter", ConversionError),
    "10,000 layers": (hparams(n_layer=10_000), "n_layer is 10000, but there are 28 tensors", ConversionError),
    "10^9 layers": (hparams(n_layer=10**9), "n_layer='1000000000'", ConfigError),
    "layers a text": (hparams(n_layer="2"), "n_layer='2': must be int", ConfigError),
    "heads that do not divide": (hparams(n_head=3), "not divisible by n_head='3'", ConfigError),
    "another width": (
        hparams(n_embd=16),
        "model/wte has shape (11, 8); the configuration requires (11, 16)",
        ConversionError,
    ),
    "a size missing": (hparams(n_ctx=...), "n_ctx is missing", ConfigError),
    "another setting": (hparams(rope=True), "'rope' is not one of", ConfigError),
    "hparams not JSON": (file("hparams.json", lambda c: c[:-3]), "is not valid JSON", CheckpointError),
    "hparams a list": (file("hparams.json", lambda c: b"[]"), "must hold an object", CheckpointError),
    "state elsewhere": (state('model_checkpoint_path: "../../secret"\n'), "'secret', which is not", CheckpointError),
    "state nowhere": (state('model_checkpoint_path: "x\x1b[2J"\n'), "'x\\x1b[2J'", CheckpointError),
    "state empty": (state(""), "names the checkpoint '', which is not beside it", CheckpointError),
}


@pytest.mark.parametrize(("damage", "message", "error"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_directory_is_refused(
    plain: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    message: str,
    error: type[BridgeError],
) -> None:
    damage(plain)
    assert_refused(plain, message, capsys, error)


def test_a_directory_without_a_valid_index_is_not_recognised(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (b"", b"x" * 100, (plain / INDEX).read_bytes()[:-1]):
        (plain / INDEX).write_bytes(content)
        assert_refused(plain, "nor hparams.json with a TensorFlow checkpoint", capsys, CheckpointError)


def test_two_checkpoints_and_no_state_file_are_refused(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(plain / INDEX, plain / "other.index")
    (plain / "checkpoint").unlink()
    assert_refused(plain, "  - openai: 'model.ckpt.index'\n  - openai: 'other.index'\n", capsys, CheckpointError)


def test_an_unknown_variable_is_named(tmp_path: Path) -> None:
    """Adam's slots are recognised by name and ignored. A variable of another name is an error."""
    path = Path(shutil.copytree(FILES / "adam", tmp_path / "adam"))
    content = (path / INDEX).read_bytes()
    (path / INDEX).write_bytes(content.replace(b"global_step", b"global_stop", 1))
    repair(path)
    with pytest.raises(ConversionError, match="'global_stop' is not a parameter"):
        bridge.load(path)


@pytest.mark.timeout(10)
def test_a_pipe_in_the_place_of_the_index_does_not_hang(plain: Path) -> None:
    (plain / INDEX).unlink()
    os.mkfifo(plain / INDEX)
    with pytest.raises(CheckpointError):
        bridge.load(plain)


@pytest.mark.parametrize("name", ["checkpoint", "hparams.json"])
def test_a_link_out_of_the_directory_is_refused(plain: Path, name: str) -> None:
    outside = plain.parent / "outside"
    (plain / name).rename(outside)
    (plain / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match=f"{name}' is a link out of the checkpoint's directory"):
        bridge.load(plain)

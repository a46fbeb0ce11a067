"""What each target format leaves out: what `bridge.save` says and does, without a conversion."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.models import TINY, huggingface_directory
from tokenizing.kinds import KINDS, ROWS

import bridge
from bridge import BridgeError
from bridge.formats import FORMATS, WRITABLE
from bridge.formats.targets import Target, targets

CONFIG = replace(TINY, n_inner=None, activation_function="gelu_new", vocab_size=ROWS, embd_pdrop=0.1)


def source(path: Path, kind: str) -> Path:
    """Write a model with a tokenizer of this kind, generation settings, and further fields in `config.json`."""
    model = huggingface_directory(path, CONFIG)
    KINDS[kind](model)
    (model / "generation_config.json").write_text("{}")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**fields, "eos_token_id": 3, "transformers_version": "5"}))
    return model


@pytest.mark.parametrize("kind", ["old_style", "unigram"])
@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
def test_it_is_what_a_conversion_leaves_out(tmp_path: Path, kind: str, activation: str) -> None:
    checkpoint = bridge.load(source(tmp_path / "model", kind)).with_activation(activation)
    found = targets(checkpoint)
    assert tuple(found) == WRITABLE
    for format, target in found.items():
        try:
            directory = bridge.save(checkpoint, tmp_path / format, format=format)
        except BridgeError as error:
            assert target == Target(str(error))
            continue
        file = None
        for suffix in FORMATS[format].suffixes[:1]:
            file = bridge.save(checkpoint, (tmp_path / format).with_suffix(suffix), format=format)
        assert target == Target(None, directory, file)


def test_a_tokenizer_that_a_target_cannot_hold_is_named(tmp_path: Path) -> None:
    found = targets(bridge.load(source(tmp_path / "model", "unigram")))["gguf"]
    assert found.file is not None
    [settings, tokenizer, files, fields] = found.file
    assert settings == "training settings that the file cannot store: embd_pdrop=0.1"
    assert "it is not byte-level BPE with GPT-2's pre-tokenizer" in tokenizer
    assert "chat_template.jinja, generation_config.json" in files
    assert fields == "a single file cannot store the fields eos_token_id of config.json; write a directory to keep them"


def test_no_tensor_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = bridge.load(source(tmp_path / "model", "old_style"))

    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("bridge.storage.stored_file.aligned_empty", refuse)
    assert targets(checkpoint)["huggingface"] == Target()

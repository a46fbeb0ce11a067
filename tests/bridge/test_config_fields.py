"""The lists of fields that decide which configurations load, compared with what transformers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from support.models import SMALLEST, TINY, huggingface_directory

import bridge
from bridge import ConfigError, GPT2Config
from bridge.config import config_diagnostics, harmless_fields
from bridge.config_fields import ALIASES, IGNORED, MUST_BE, STATED, TRANSFORMERS, UNSUPPORTED
from bridge.containers.safetensors import read_file

OWN = {*TINY.to_hf(), *(alias for names in ALIASES.values() for alias in names)}
LISTS = {
    "STATED": STATED,
    "MUST_BE": MUST_BE,
    "UNSUPPORTED": UNSUPPORTED,
    "IGNORED": IGNORED,
    "TRANSFORMERS": TRANSFORMERS,
}


def with_fields(**fields: Any) -> dict[str, Any]:
    return {**TINY.to_hf(), **fields}


def test_no_field_is_in_two_lists() -> None:
    names = [name for listed in (OWN - {"model_type", "architectures"}, *LISTS.values()) for name in listed]
    assert sorted(names) == sorted(set(names))


def test_every_field_that_transformers_reads_for_a_gpt2_is_in_a_list(tmp_path: Path) -> None:
    """Every access to the configuration is recorded while a model is loaded, trained for one step, and generates."""
    read: set[str] = set()

    class Recording(transformers.GPT2Config):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    path, ids = huggingface_directory(tmp_path / "model", SMALLEST), torch.tensor([[1, 2], [3, 4]])
    for attention in ("eager", "sdpa"):
        config = Recording.from_pretrained(path, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        model = transformers.GPT2LMHeadModel.from_pretrained(path, config=config, attn_implementation=attention)
        model(ids, labels=ids, attention_mask=torch.ones_like(ids)).loss.backward()
        for options in ({}, {"num_beams": 2}, {"do_sample": True}):
            model.eval().generate(ids, max_new_tokens=2, attention_mask=torch.ones_like(ids), **options)
    assert {"n_inner", "is_causal", "sliding_window", "add_cross_attention"} <= read, "the accesses were recorded"
    of_the_class = {name for name in read if name.startswith("__") or hasattr(transformers.GPT2Config, name)}
    assert read - of_the_class - OWN - {name for listed in LISTS.values() for name in listed} == set()


def test_every_field_that_transformers_writes_loads_without_a_word() -> None:
    written = json.loads(transformers.GPT2Config().to_json_string(use_diff=False))
    assert GPT2Config.from_hf(written).n_embd == 768
    assert config_diagnostics(written) == ()
    for file in Path(__file__).parents[1].glob("files/transformers-4.57.6/*/config.json"):
        assert config_diagnostics(json.loads(file.read_bytes())) == ()


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_field_is_refused_by_name_unless_it_is_off(name: str) -> None:
    for off in (None, False, 0, 0.0, "", [], {}, {"adapters": {}}, *UNSUPPORTED[name]):
        assert GPT2Config.from_hf(with_fields(**{name: off})) == TINY
    for on in (True, 7, "rope", [1], {"a": 1}):
        if on not in UNSUPPORTED[name]:
            with pytest.raises(ConfigError, match=rf"(?m)^  - {name}='.*not supported; it must be absent"):
                GPT2Config.from_hf(with_fields(**{name: on}))


@pytest.mark.parametrize("name", MUST_BE)
def test_a_required_field_has_one_value(name: str) -> None:
    assert GPT2Config.from_hf(with_fields(**{name: MUST_BE[name]})) == TINY
    for other in (None, False, 7):
        with pytest.raises(ConfigError, match=rf"(?m)^  - {name}='.*must be True"):
            GPT2Config.from_hf(with_fields(**{name: other}))


@pytest.mark.parametrize("name", STATED)
def test_a_field_of_another_program_must_equal_the_models(name: str) -> None:
    own = getattr(TINY, STATED[name])
    assert GPT2Config.from_hf(with_fields(**{name: own})) == TINY
    assert GPT2Config.from_hf(with_fields(**{name: None})) == TINY
    for other in (False, 7, "x", [own]):
        with pytest.raises(ConfigError, match=rf"(?m)^  - {name}='.*but {STATED[name]} is"):
            GPT2Config.from_hf(with_fields(**{name: other}))


def test_a_changed_model_is_exported_with_its_own_values_under_every_name(tmp_path: Path) -> None:
    """Otherwise this project would refuse its own export."""
    path = huggingface_directory(tmp_path / "model")
    fields = with_fields(n_vocab=TINY.vocab_size, padded_vocab_size=TINY.vocab_size, d_model=TINY.n_embd)
    (path / "config.json").write_text(json.dumps(fields))
    bridge.save(bridge.load(path).with_vocab_size(99), tmp_path / "cut", format="huggingface")
    assert {"n_vocab": 99, "padded_vocab_size": 99, "d_model": TINY.n_embd}.items() <= bridge.load(
        tmp_path / "cut"
    ).extra.items()


@pytest.mark.parametrize("format", ["huggingface", "flax", "flax_msgpack", "gguf"])
def test_ignored_fields_are_reported_and_kept(tmp_path: Path, format: str) -> None:
    added = {"hidden_act": "relu", "window_size": 256, "author": "\x1b[31m", "my field": [1], "bias": True}
    path = huggingface_directory(tmp_path / "model")
    (path / "config.json").write_text(json.dumps(with_fields(**added)))
    bridge.save(bridge.load(path), tmp_path / "out", format=format)
    found = bridge.load(tmp_path / "out")
    assert found.config == TINY
    assert harmless_fields(found.extra) == added
    expected = (
        "config.json has fields that GPT-2 ignores, which are kept: author='\\x1b[31m', hidden_act='relu', "
        "'my field'='[1]', window_size='256'"
    )
    assert expected in found.diagnostics
    assert expected in bridge.find_diagnostics(found)


def test_the_report_of_many_fields_is_short() -> None:
    (note,) = config_diagnostics(with_fields(**{f"note{i}": "x" * 1000 for i in range(500)}))
    assert note.endswith(" and 480 more")
    assert len(note) < 2000


def test_the_positions_decide_and_a_different_context_is_reported() -> None:
    fields = with_fields(n_ctx=1024)
    assert GPT2Config.from_hf(fields).n_positions == TINY.n_positions
    (note,) = config_diagnostics(fields)
    assert note.startswith("n_ctx='1024' differs from n_positions='40', which decides")
    assert GPT2Config.from_hf(fields).to_hf(harmless_fields(fields))["n_ctx"] == TINY.n_positions
    del fields["n_positions"]
    assert GPT2Config.from_hf(fields).n_positions == 1024
    assert "has no n_positions" in config_diagnostics(fields)[0]
    assert config_diagnostics(with_fields()) == ()


def test_a_configuration_with_every_size_needs_no_model_type() -> None:
    sizes = {"vocab_size": 257, "n_positions": 40, "n_embd": 48, "n_layer": 5, "n_head": 3}
    assert GPT2Config.from_hf(sizes).n_layer == 5
    assert config_diagnostics(sizes) == ("config.json has no model_type; it was read as a GPT-2",)
    context = {"n_ctx" if name == "n_positions" else name: size for name, size in sizes.items()}
    assert GPT2Config.from_hf(context).n_positions == 40
    others = [{k: v for k, v in sizes.items() if k != name} for name in sizes]
    gpt1 = {**sizes, "n_ctx": 40, "afn": "gelu"}  # OpenAI's GPT-1, in the form that CDial-GPT publishes
    for fields in (*others, {**sizes, "architectures": ["OpenAIGPTLMHeadModel"]}, gpt1):
        with pytest.raises(ConfigError, match=r"model_type|afn"):
            GPT2Config.from_hf(fields)


# What the classes GPT2Model and TextModel of llama.cpp's convert_hf_to_gguf.py read (in newer versions
# conversion/gpt2.py and conversion/base.py). The number of layers is the first of n_layers, num_hidden_layers, n_layer
# and num_layers; the class is found by `architectures`.
LLAMA_CPP_HPARAMS = ("n_ctx", "n_embd", "n_head", "n_layer", "layer_norm_epsilon", "vocab_size", "architectures")
LLAMA_CPP_LAYERS = ("n_layers", "num_hidden_layers", "n_layer", "num_layers")


def test_the_bundled_models_export_has_what_the_converter_of_llama_cpp_reads(tmp_path: Path) -> None:
    checkpoint = bridge.load("bundled")
    bridge.save(checkpoint, tmp_path / "export", format="huggingface")
    hparams = json.loads((tmp_path / "export" / "config.json").read_bytes())
    assert {name: hparams[name] for name in LLAMA_CPP_HPARAMS} == {
        "n_layer": checkpoint.config.n_layer,
        "n_ctx": checkpoint.config.n_positions,
        "n_embd": checkpoint.config.n_embd,
        "n_head": checkpoint.config.n_head,
        "layer_norm_epsilon": checkpoint.config.layer_norm_epsilon,
        "vocab_size": checkpoint.config.vocab_size,
        "architectures": ["GPT2LMHeadModel"],
    }
    assert {hparams[name] for name in LLAMA_CPP_LAYERS if name in hparams} == {checkpoint.config.n_layer}
    tensors = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, checkpoint.config.n_layer)
    stored = read_file(tmp_path / "export" / "model.safetensors")[0].entries
    found = {name: tensors.get_name(name, try_suffixes=(".weight", ".bias")) for name in stored}
    assert all(found.values()), found
    assert len(set(found.values())) == len(stored) == len(bridge.parameters(checkpoint.config))

"""Weights to and from the reference: state_dicts of other programs, directories, and dtypes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from support.implementations import transformers_model
from support.models import TINY, huggingface_directory, random_checkpoint, random_ids, random_state

import bridge
from gpt2_torch import GPT2, checkpoint_from_model, model_from_checkpoint

IDS = torch.from_numpy(random_ids(TINY))
UNTIED = replace(TINY, tie_word_embeddings=False)
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]


def tensors(config: bridge.GPT2Config = TINY) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in random_state(config).items()}


def assert_loads(given: dict[str, torch.Tensor], config: bridge.GPT2Config = TINY) -> None:
    model = GPT2(config)
    before = list(given)
    model.load_state_dict(given)
    assert list(given) == before, "the caller's dictionary is unchanged"
    for name, tensor in tensors(config).items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_a_language_model_of_transformers_loads_directly(config: bridge.GPT2Config):
    given = transformers_model(random_checkpoint(config)).state_dict()
    assert {"transformer.wte.weight", "lm_head.weight"} <= set(given)
    assert_loads(given, config)


def test_a_headless_model_of_transformers_loads_directly():
    given = transformers_model(random_checkpoint()).transformer.state_dict()
    assert "wte.weight" in given
    assert_loads(given)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.transformer."])
def test_names_written_by_wrappers_load(prefix: str):
    assert_loads({prefix + name: tensor for name, tensor in tensors().items()})


def test_state_dicts_of_torch_compile_and_data_parallel_load():
    model = GPT2(TINY)
    model.load_state_dict(tensors())
    for wrapped in (torch.compile(model, backend="eager"), torch.nn.DataParallel(model)):
        given = wrapped.state_dict()
        assert "wte.weight" not in given
        assert_loads(given)


def test_causal_mask_buffers_of_old_transformers_are_ignored():
    given = tensors()
    for i in range(TINY.n_layer):
        given[f"h.{i}.attn.bias"] = torch.ones(1, 1, TINY.n_positions, TINY.n_positions).tril()
        given[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    assert_loads(given)


def test_a_tied_head_that_differs_is_reported():
    given = tensors()
    given["lm_head.weight"] = given["wte.weight"] + 1
    with pytest.raises(RuntimeError, match=r"Unexpected.*lm_head"):
        GPT2(TINY).load_state_dict(given)


def test_a_missing_parameter_is_reported():
    given = {f"transformer.{name}": tensor for name, tensor in tensors().items()}
    del given["transformer.h.3.ln_2.bias"]
    with pytest.raises(RuntimeError, match=r"Missing.*h\.3\.ln_2\.bias"):
        GPT2(TINY).load_state_dict(given)


def test_an_untied_model_requires_its_head():
    with pytest.raises(RuntimeError, match=r"Missing.*lm_head"):
        GPT2(UNTIED).load_state_dict(tensors())


def test_the_same_parameter_twice_is_refused():
    given = tensors()
    given["transformer.wte.weight"] = given["wte.weight"]
    with pytest.raises(bridge.ConversionError, match=r"wte\.weight.* is the canonical name of 2 tensors"):
        GPT2(TINY).load_state_dict(given)


def test_it_loads_as_a_submodule():
    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm, self.other = GPT2(TINY), torch.nn.Linear(2, 3)

    source, target = Outer(), Outer()
    target.load_state_dict(source.state_dict())
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: np.dtype(t).name)
def test_a_directory_survives_a_round_trip_bit_for_bit(dtype: type, tmp_path: Path):
    first = huggingface_directory(tmp_path / "first", UNTIED, dtype=dtype)
    model = GPT2.from_pretrained(first)
    assert not model.training
    assert all(p.requires_grad and str(p.dtype) == f"torch.{np.dtype(dtype).name}" for p in model.parameters())
    bridge.save(checkpoint_from_model(model), tmp_path / "second", format="huggingface")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "second" / file).read_bytes() == (first / file).read_bytes(), file


def test_a_directory_written_by_transformers_loads(tmp_path: Path):
    torch.manual_seed(0)
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY.to_hf())).eval()
    peer.save_pretrained(tmp_path / "model")
    model = GPT2.from_pretrained(tmp_path / "model")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, peer.transformer.state_dict()[name]), name


def test_training_a_model_does_not_change_its_checkpoint():
    original = model_from_checkpoint(random_checkpoint())
    checkpoint = checkpoint_from_model(original)
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    model = model_from_checkpoint(checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert all(torch.equal(original.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_source_that_is_not_a_checkpoint_is_a_bridge_error(tmp_path: Path):
    with pytest.raises(bridge.BridgeError):
        GPT2.from_pretrained(tmp_path)

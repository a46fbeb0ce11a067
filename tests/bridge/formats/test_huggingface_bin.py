"""Hugging Face's `pytorch_model.bin`, written here by torch.save (2.13) under the names of each generation.

transformers 5 writes only safetensors. These are the names, buffers and indexes of older versions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from support.models import SMALLEST, random_state
from support.refusals import assert_refused

import bridge
from bridge import CheckpointError, ConversionError
from gpt2_torch.arrays import tensor_from_array

P = SMALLEST.n_positions
State = dict[str, torch.Tensor]


def state_dict(prefix: str = "transformer.", dtype: type = np.float32) -> State:
    return {prefix + name: tensor_from_array(array) for name, array in random_state(SMALLEST, dtype).items()}


def saved(path: Path, state: object, **fields: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**SMALLEST.to_hf(), **fields}))
    torch.save(state, path / "pytorch_model.bin")
    return path


def assert_is_the_model(path: Path, dtype: type = np.float32) -> None:
    found = bridge.load(path)
    assert (found.format, found.config) == ("huggingface", SMALLEST)
    assert bridge.fingerprint(found.tensors) == bridge.fingerprint(random_state(SMALLEST, dtype))


def with_mask_buffers(state: State) -> State:
    for layer in range(SMALLEST.n_layer):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, P, P, dtype=torch.bool).tril()
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return state


def with_head(state: State, name: str = "lm_head.weight") -> State:
    return {**state, name: state["transformer.wte.weight"]}  # one storage, as in a tied model


def as_before_transformers(state: State) -> State:
    """Use the names of LayerNorms in pytorch-pretrained-bert."""
    norms = (".ln_1.", ".ln_2.", ".ln_f.")
    old = {"weight": "gamma", "bias": "beta"}
    return {
        (f"{name.rpartition('.')[0]}.{old[name.rpartition('.')[2]]}" if any(n in name for n in norms) else name): tensor
        for name, tensor in state.items()
    }


GENERATIONS: dict[str, Callable[[], State]] = {
    "the hub's gpt2, without prefix": lambda: state_dict(prefix=""),
    "GPT2LMHeadModel": lambda: with_head(state_dict()),
    "with mask buffers": lambda: with_head(with_mask_buffers(state_dict())),
    "DialoGPT": lambda: with_head(state_dict(), "lm_head.decoder.weight"),
    "gamma and beta": lambda: as_before_transformers(state_dict()),
    "DDP": lambda: state_dict("module.transformer."),
    "compiled DDP": lambda: state_dict("_orig_mod.module.transformer."),
    "a compiled submodule": lambda: state_dict("transformer._orig_mod."),
    "a module with the model as an attribute": lambda: state_dict("model.transformer."),
    "TRL": lambda: state_dict("pretrained_model.transformer."),
    "Opacus": lambda: state_dict("_module.transformer."),
    "PEFT": lambda: state_dict("base_model.model.transformer."),
    "FSDP": lambda: state_dict("_fsdp_wrapped_module.transformer."),
    "several wrappers": lambda: state_dict("module._orig_mod.pretrained_model.base_model.model.transformer."),
    "parameters": lambda: {name: torch.nn.Parameter(tensor) for name, tensor in state_dict().items()},
}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_is_read(tmp_path: Path, generation: str) -> None:
    assert_is_the_model(saved(tmp_path / "model", GENERATIONS[generation]()))


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name
)
def test_every_float_type_is_read_bit_for_bit(tmp_path: Path, dtype: type) -> None:
    assert_is_the_model(saved(tmp_path / "model", state_dict(dtype=dtype)), dtype)


def test_the_file_can_be_given_under_any_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "model", state_dict())
    (path / "pytorch_model.bin").rename(path / "medium_ft.pkl")  # the name that DialoGPT uses
    assert_is_the_model(path / "medium_ft.pkl")


def test_unusual_properties_are_reported(tmp_path: Path) -> None:
    path = saved(tmp_path / "model", with_head(with_mask_buffers(as_before_transformers(state_dict()))))
    buffers, head, names = bridge.load(path).diagnostics
    assert buffers.startswith("4 causal-mask buffers")
    assert "lm_head.weight is stored although the head is tied" in head
    assert "gamma and beta" in names


def test_the_prefix_of_a_wrapper_is_reported(tmp_path: Path) -> None:
    path = saved(tmp_path / "model", state_dict("module.model.transformer."))
    [note] = bridge.load(path).diagnostics
    assert note == "the names of the tensors have the prefix 'module.model.' of a wrapper, which was removed"


def lightning_checkpoint(prefix: str = "model.transformer.") -> dict[str, object]:
    """Return the entries of a `.ckpt` of Lightning 2.6, with AdamW's state."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    return {
        "epoch": 0,
        "global_step": 1,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": state_dict(prefix),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(1.5), "dirpath": "runs"}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"learning_rate": 1e-3},
    }


def test_a_checkpoint_of_lightning_is_read_and_the_rest_of_it_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "model", lightning_checkpoint())
    (path / "pytorch_model.bin").rename(path / "last.ckpt")
    assert_is_the_model(path / "last.ckpt")
    rest, prefix = bridge.load(path / "last.ckpt").diagnostics
    assert rest.startswith("read from 'state_dict'; the file also holds 'epoch', 'global_step', ")
    assert all(repr(name) in rest for name in lightning_checkpoint() if name != "state_dict")
    assert "'model.'" in prefix


def test_a_checkpoint_of_only_a_state_dict_has_nothing_to_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "model", {"state_dict": state_dict()})
    assert_is_the_model(path)
    assert bridge.load(path).diagnostics == ()


def test_hundreds_of_other_entries_are_counted(tmp_path: Path) -> None:
    path = saved(tmp_path / "model", {"state_dict": state_dict(), **{f"entry {k}": k for k in range(500)}})
    [note] = bridge.load(path).diagnostics
    assert note.endswith(" and 460 more, which was not read") and len(note) < 1000


def in_shards(path: Path, total: Callable[[State], float]) -> Path:
    """Write two files and an index, as transformers writes them since 4.18."""
    state = with_head(with_mask_buffers(state_dict()))
    names = sorted(state)
    halves = {f"pytorch_model-0000{k + 1}-of-00002.bin": names[k::2] for k in range(2)}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(SMALLEST.to_hf()))
    for file, part in halves.items():
        torch.save({name: state[name] for name in part}, path / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    index = {"metadata": {"total_size": total(state)}, "weight_map": weight_map}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return path


def in_bytes(tensor: torch.Tensor, of_a_boolean: float = 1) -> float:
    return tensor.numel() * (of_a_boolean if tensor.dtype == torch.bool else tensor.element_size())


@pytest.mark.parametrize(
    "total",
    [
        lambda state: sum(map(in_bytes, state.values())),
        lambda state: sum(map(in_bytes, state.values())) - in_bytes(state["lm_head.weight"]),
        lambda state: sum(in_bytes(tensor, 1 / 8) for tensor in state.values()),  # transformers' dtype_byte_size
    ],
    ids=["bytes", "a tied head once", "a boolean as a bit"],
)
def test_shards_are_read(tmp_path: Path, total: Callable[[State], float]) -> None:
    assert_is_the_model(in_shards(tmp_path / "model", total))


@pytest.mark.parametrize("total", [0, 1, -5, 10**30, "many", None, [], True])
def test_a_wrong_total_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], total: object) -> None:
    path = in_shards(tmp_path / "model", lambda state: total)  # type: ignore[arg-type, return-value]
    assert_refused(path, "total_size is", capsys, CheckpointError)


def test_a_missing_shard_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = in_shards(tmp_path / "model", lambda state: sum(map(in_bytes, state.values())))
    (path / "pytorch_model-00002-of-00002.bin").unlink()
    assert_refused(path, "'pytorch_model-00002-of-00002.bin' is missing; download it", capsys, CheckpointError)


NO_STATE_DICTS: dict[str, tuple[Callable[[], object], str, type[bridge.BridgeError]]] = {
    "a list": (lambda: list(state_dict().values()), "holds list, not a state_dict", CheckpointError),
    "a tensor": (lambda: torch.ones(2), "holds LazyTensor, not a state_dict", CheckpointError),
    "a training state under another name": (
        lambda: {"weights": state_dict(), "epoch": 1},
        "'weights' is dict, not a tensor",
        CheckpointError,
    ),
    "a state_dict with a number": (
        lambda: {"state_dict": {**state_dict(), "step": 3}, "epoch": 1},
        "'step' is int, not a tensor",
        CheckpointError,
    ),
    "an empty state_dict": (lambda: {"state_dict": {}, "epoch": 1}, "wte.weight is missing", ConversionError),
    "a state_dict that is a list": (lambda: {"state_dict": []}, "'state_dict' is list, not a tensor", CheckpointError),
    "prefixes on some names": (
        lambda: {**state_dict("model.transformer."), "lm_head.weight": state_dict()["transformer.wte.weight"]},
        "'lm_head.weight' has no prefix",
        ConversionError,
    ),
    "an unknown prefix": (lambda: state_dict("net.transformer."), "prefix 'net.transformer.'", ConversionError),
    "a number beside tensors": (lambda: {**state_dict(), "step": 3}, "'step' is int, not a tensor", CheckpointError),
    "numbers as names": (
        lambda: dict(enumerate(state_dict().values())),
        "'0' is not a valid name of a tensor",
        CheckpointError,
    ),
    "another head": (
        lambda: {**state_dict(), "lm_head.weight": torch.ones(11, 8)},
        "differs from wte",
        ConversionError,
    ),
    "nothing": (dict, "wte.weight is missing", ConversionError),
}


@pytest.mark.parametrize(("make", "message", "error"), NO_STATE_DICTS.values(), ids=NO_STATE_DICTS)
def test_an_object_that_is_not_a_state_dict_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[], object],
    message: str,
    error: type[bridge.BridgeError],
) -> None:
    assert_refused(saved(tmp_path / "model", make()), message, capsys, error)


def test_safetensors_take_precedence(tmp_path: Path) -> None:
    path = saved(tmp_path / "model", {"ignored": torch.ones(2)})
    bridge.save(bridge.Checkpoint.of(random_state(SMALLEST), SMALLEST), tmp_path / "other", format="huggingface")
    (tmp_path / "other" / "model.safetensors").rename(path / "model.safetensors")
    assert_is_the_model(path)

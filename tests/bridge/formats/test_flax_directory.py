"""This project's own directory: the Flax tree in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.traverse_util
import ml_dtypes
import numpy as np
import pytest
import safetensors.flax
from support.models import TINY, random_checkpoint

import bridge
from bridge import CheckpointError, ConfigError, ConversionError, GPT2Config
from bridge.containers.safetensors import read_file, write_file
from bridge.storage.tensors import LazyTensorMap
from bridge.storage.trees import flatten

UNTIED = replace(TINY, tie_word_embeddings=False)
NO_BIAS = replace(TINY, bias=False)
CONFIGS = pytest.mark.parametrize("config", [TINY, UNTIED, NO_BIAS], ids=["tied", "untied", "no-bias"])
WEIGHTS = "flax_model.safetensors"


def assert_same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


@CONFIGS
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64])
def test_the_round_trip_is_bit_for_bit(tmp_path: Path, config: GPT2Config, dtype: type) -> None:
    checkpoint = random_checkpoint(config, dtype)
    bridge.save(checkpoint, tmp_path / "out", format="flax")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", WEIGHTS]
    back = bridge.load(tmp_path / "out")
    assert (back.format, back.config) == ("flax", config)
    assert_same(back.tensors, checkpoint.tensors)


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_round_trip_from_hugging_face_gives_the_same_files(tmp_path: Path, config: GPT2Config, dtype: type) -> None:
    bridge.save(random_checkpoint(config, dtype), tmp_path / "hf", format="huggingface")
    bridge.save(bridge.load(tmp_path / "hf"), tmp_path / "flax", format="flax")
    bridge.save(bridge.load(tmp_path / "flax"), tmp_path / "back", format="huggingface")
    bridge.save(bridge.load(tmp_path / "back"), tmp_path / "flax2", format="flax")
    for first, second in (("hf", "back"), ("flax", "flax2")):
        files = {file.name: file.read_bytes() for file in (tmp_path / first).iterdir()}
        assert files == {file.name: file.read_bytes() for file in (tmp_path / second).iterdir()}


@CONFIGS
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_safetensors_and_flax_by_themselves_give_the_same_tree(tmp_path: Path, config: GPT2Config, dtype: type) -> None:
    checkpoint = random_checkpoint(config, dtype)
    bridge.save(checkpoint, tmp_path / "out", format="flax")
    theirs = flax.traverse_util.unflatten_dict(safetensors.flax.load_file(tmp_path / "out" / WEIGHTS), sep="/")
    ours = flatten(bridge.to_flax(checkpoint.tensors, config))
    found = flatten(theirs)
    assert set(found) == set(ours)
    for path, array in ours.items():
        assert (found[path].dtype, found[path].shape) == (array.dtype, array.shape), path
        assert np.asarray(found[path]).tobytes() == array.tobytes(), path


def test_the_metadata_says_flax(tmp_path: Path) -> None:
    bridge.save(random_checkpoint(), tmp_path / "out", format="flax")
    assert read_file(tmp_path / "out" / WEIGHTS)[1] == {"format": "flax"}


def test_bias_is_in_config_json_only_if_it_is_false(tmp_path: Path) -> None:
    for config in (TINY, NO_BIAS):
        bridge.save(random_checkpoint(config), tmp_path / "out", format="flax", overwrite=True)
        written = json.loads((tmp_path / "out" / "config.json").read_text())
        assert written.get("bias", True) is config.bias
        assert "bias" not in bridge.load(tmp_path / "out").extra


@pytest.mark.parametrize("bias", ["false", 0, None, []])
def test_a_bias_that_is_not_a_bool_is_refused(tmp_path: Path, bias: object) -> None:
    path = saved(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "bias": bias}))
    with pytest.raises(ConfigError, match="bias="):
        bridge.load(path)


def saved(tmp_path: Path, edit: Mapping[str, Any] | None = None) -> Path:
    """Write a directory in which the tensors in `edit` are replaced, or removed if the value is None."""
    path = tmp_path / "out"
    bridge.save(random_checkpoint(), path, format="flax")
    if edit is not None:
        tensors = {**read_file(path / WEIGHTS)[0], **edit}
        (path / WEIGHTS).unlink()
        kept = {name: array for name, array in tensors.items() if array is not None}
        write_file(path / WEIGHTS, LazyTensorMap.of(kept), {})
    return path


def test_missing_extra_misshapen_and_unusable_tensors_are_in_one_error(tmp_path: Path) -> None:
    edit = {
        "h_1/ln_1/scale": None,
        "h_5/ln_1/scale": np.ones(48, np.float32),
        "h_2/attn/c_attn/kernel": np.ones((48, 144), np.float32),  # PyTorch's shape: the same bytes
        "ln_f/bias": np.ones(48, np.int32),
    }
    path = saved(tmp_path, edit)
    with pytest.raises(ConversionError) as caught:
        bridge.load(path)
    assert str(caught.value).splitlines() == [
        f"'{path / WEIGHTS}':",
        "  - h_1/ln_1/scale is missing (shape (48,))",
        "  - h_2/attn/c_attn/kernel has shape (48, 144); the configuration requires (48, 3, 3, 16)",
        "  - 'h_5/ln_1/scale' is not a parameter of this model",
        "  - 'ln_f/bias' holds int32; weights must be one of float32, float16, bfloat16, float64",
    ]


def test_a_head_beside_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, {"lm_head/embedding": np.ones((257, 48), np.float32)})
    with pytest.raises(ConversionError, match="'lm_head/embedding' is not a parameter"):
        bridge.load(path)


def test_damaged_weights_are_refused_by_file(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=WEIGHTS):
        bridge.load(path)

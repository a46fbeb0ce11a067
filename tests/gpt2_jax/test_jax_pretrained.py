"""Weights to and from the port: dtypes, forms of the tree, and shared memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from support.models import TINY, huggingface_directory, random_checkpoint, random_ids, random_state

import bridge
import gpt2_jax
from bridge.storage.trees import flatten

UNTIED = replace(TINY, tie_word_embeddings=False)
IDS = random_ids(UNTIED)
STORED = [np.float32, np.float16, ml_dtypes.bfloat16]
each_stored_dtype = pytest.mark.parametrize("dtype", STORED, ids=lambda t: np.dtype(t).name)
each_form = pytest.mark.parametrize(
    "form", [{}, {"scan": True}, {"vocab_multiple": 64}, {"scan": True, "vocab_multiple": 64}], ids=str
)


def assert_same_bits(found: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert np.asarray(found[name]).tobytes() == array.tobytes(), name


@each_form
@each_stored_dtype
def test_a_directory_survives_a_round_trip_bit_for_bit(dtype: type, form: dict[str, Any], tmp_path: Path):
    first = huggingface_directory(tmp_path / "first", UNTIED, dtype=dtype)
    model, params = gpt2_jax.from_pretrained(first, **form)
    assert model.param_dtype == dtype
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == dtype for leaf in jax.tree.leaves(params))
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    checkpoint = gpt2_jax.checkpoint_from_params(model, params)
    assert_same_bits(dict(checkpoint.tensors), random_state(UNTIED, dtype))
    bridge.save(checkpoint, tmp_path / "second", format="huggingface")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "second" / file).read_bytes() == (first / file).read_bytes(), file


def test_float64_is_kept_or_refused_but_never_narrowed(tmp_path: Path):
    directory = huggingface_directory(tmp_path / "model", dtype=np.float64)
    with pytest.raises(bridge.ConversionError, match="JAX_ENABLE_X64"):
        gpt2_jax.from_pretrained(directory)
    _, params = gpt2_jax.from_pretrained(directory, param_dtype=jnp.float32)
    assert params["wpe"]["embedding"].dtype == jnp.float32
    with jax.enable_x64(True):
        model, params = gpt2_jax.from_pretrained(directory)
        assert_same_bits(dict(gpt2_jax.checkpoint_from_params(model, params).tensors), random_state(TINY, np.float64))


@each_stored_dtype
@pytest.mark.parametrize("wanted", STORED, ids=lambda t: np.dtype(t).name)
def test_param_dtype_casts(wanted: type, dtype: type, tmp_path: Path):
    directory = huggingface_directory(tmp_path / "model", dtype=dtype)
    model, params = gpt2_jax.from_pretrained(directory, param_dtype=wanted)
    assert model.param_dtype == wanted
    expected = bridge.to_flax({name: a.astype(wanted) for name, a in random_state(TINY, dtype).items()}, TINY)
    assert_same_bits(flatten(params), flatten(expected))


def test_the_default_compute_dtype_is_float32(tmp_path: Path):
    directory = huggingface_directory(tmp_path / "model", dtype=ml_dtypes.bfloat16)
    for kwargs, dtype in (({}, jnp.float32), ({"dtype": jnp.bfloat16}, jnp.bfloat16)):
        model, params = gpt2_jax.from_pretrained(directory, **kwargs)
        assert model.apply({"params": params}, random_ids(TINY)).dtype == dtype


def test_models_from_the_same_source_are_equal_so_jit_compiles_once(tmp_path: Path):
    directory = huggingface_directory(tmp_path / "model")
    first, second = (gpt2_jax.from_pretrained(directory)[0] for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)


def test_a_source_that_is_not_a_checkpoint_is_a_bridge_error(tmp_path: Path):
    with pytest.raises(bridge.BridgeError):
        gpt2_jax.from_pretrained(tmp_path)


@each_form
def test_donating_parameters_does_not_corrupt_other_arrays(form: dict[str, Any], tmp_path: Path):
    """JAX must not overwrite buffers that numpy also holds."""
    directory = huggingface_directory(tmp_path / "model", UNTIED)
    checkpoint = bridge.load(directory)
    model, params = gpt2_jax.model_from_checkpoint(checkpoint, **form)
    other = gpt2_jax.model_from_checkpoint(checkpoint, **form)[1]
    exported = gpt2_jax.checkpoint_from_params(model, params)
    overwrite = jax.jit(lambda params: jax.tree.map(lambda x: 3 * x + 1, params), donate_argnums=0)
    params = jax.block_until_ready(overwrite(overwrite(params)))
    expected = random_state(UNTIED)
    assert_same_bits(dict(checkpoint.tensors), expected)
    assert_same_bits(dict(exported.tensors), expected)
    assert_same_bits(dict(gpt2_jax.checkpoint_from_params(model, other).tensors), expected)


def test_donating_parameters_does_not_change_their_source_arrays(tmp_path: Path):
    state = random_state(UNTIED)
    _, params = gpt2_jax.model_from_checkpoint(bridge.Checkpoint.of(state, UNTIED))
    overwrite = jax.jit(lambda params: jax.tree.map(lambda x: 3 * x + 1, params), donate_argnums=0)
    jax.block_until_ready(overwrite(params))
    assert_same_bits(state, random_state(UNTIED))


@each_form
def test_training_the_torch_model_does_not_change_parameters_from_it(form: dict[str, Any]):
    import torch

    import gpt2_torch

    source = gpt2_torch.model_from_checkpoint(random_checkpoint(UNTIED))
    model, params = gpt2_jax.model_from_checkpoint(gpt2_torch.checkpoint_from_model(source), **form)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(2)
    assert_same_bits(dict(gpt2_jax.checkpoint_from_params(model, params).tensors), random_state(UNTIED))

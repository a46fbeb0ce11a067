"""Training on eight simulated devices: it equals training on one, and arrays are sharded as specified."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from support import on_meshes
from support.models import config_for, random_checkpoint
from support.training_runs import recipe

import bridge
from bridge import BridgeError, Checkpoint, GPT2Config, parameters
from bridge.formats import WRITABLE
from gpt2_jax.loading import _Stored
from gpt2_jax.parallel.sharding import RULES, MeshError, make_mesh, shardings, spec_of
from gpt2_jax.training import TrainingError, make_optimizer
from gpt2_jax.training.batch_placement import Rows, batch_rows, microbatch_rows
from gpt2_jax.training.state import abstract_state, make_model

ROOT = Path(__file__).parents[2]
LOSSES = {"float32": on_meshes.SAME_CURVE, "float64": 1e-11}
GRADIENTS = {"float32": 1e-5, "float64": 1e-13}
"""Largest error of a parameter, relative to its largest value."""


def on_eight_devices(name: str, directory: Path, *arguments: str, x64: bool = False) -> Any:
    file = directory / f"{name}.json"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": str(int(x64)),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    command = [sys.executable, "-W", "error", on_meshes.__file__, name, str(file), *arguments]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert child.returncode == 0, child.stderr
    assert "full rematerialization" not in child.stderr, "the compiler moves whole activations"
    return json.loads(file.read_text())


def assert_the_same(found: dict[str, Any], dtype: str) -> None:
    for mesh, differences in found.items():
        assert differences["losses"] <= LOSSES[dtype], mesh
        assert differences["gradients"] <= GRADIENTS[dtype], mesh
        assert not differences["misplaced"], mesh
        assert differences["learned"] > 0.1, "twenty steps that change nothing would agree on any mesh"


def test_losses_and_gradients_equal_those_of_one_device(tmp_path: Path) -> None:
    assert_the_same(on_eight_devices("curves", tmp_path, "float32", "some"), "float32")


@pytest.mark.mesh
@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_losses_and_gradients_agree_on_every_mesh(dtype: str, num_microbatches: int, tmp_path: Path) -> None:
    found = on_eight_devices("curves", tmp_path, dtype, "all", str(num_microbatches), x64=dtype == "float64")
    print(json.dumps(found, indent=1))
    assert len(found) == 20
    assert_the_same(found, dtype)


@pytest.mark.mesh
def test_an_adapter_is_trained_on_meshes_as_on_one_device(tmp_path: Path) -> None:
    assert_the_same(on_eight_devices("curves", tmp_path, "float32", "some", "2", "4"), "float32")


@pytest.mark.mesh
def test_arrays_are_sharded_as_in_the_table(tmp_path: Path) -> None:
    model = on_meshes.MODEL
    whole = {p.flax_path[1:]: [model.n_layer, *p.flax_shape] for p in parameters(model) if p.layer is not None}
    for text, shapes in on_eight_devices("programs", tmp_path).items():
        sizes = dict(zip(("data", "fsdp", "tensor"), map(int, re.findall(r"=(\d)", text)), strict=True))
        for path, shape in whole.items():
            split = [axis for axis in spec_of("/".join(path), len(shape)) if axis and sizes[axis] > 1]
            if split:
                assert shape not in shapes["drawn"], (text, path)
                assert shape not in shapes["step"], (text, path)
        if sizes["tensor"] > 1:
            assert not [s for s in shapes["step"] if on_meshes.V in s and math.prod(s) > on_meshes.V], text
        rows = on_meshes.B // (sizes["data"] * sizes["fsdp"])
        logits = [s for s in shapes["gathers"] if s[-1] == on_meshes.V and math.prod(s) >= rows * on_meshes.V]
        assert not logits, (text, "logits are all-gathered")
        if sizes["fsdp"] * sizes["tensor"] > 1:
            assert [on_meshes.V, on_meshes.D] not in shapes["drawn"], text


def test_a_checkpoint_of_any_format_is_loaded_sharded(tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    for format in WRITABLE:
        config = config_for(format, replace(on_meshes.MODEL, activation_function="gelu_new"))
        bridge.save(random_checkpoint(config), sources / format, format=format)
    found = on_eight_devices("loaded", tmp_path, str(sources))
    assert len(found) == 2 * len(WRITABLE)
    for name, problems in found.items():
        assert problems == {"differing": [], "read again": 0}, name


# The table


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon", "ema_decay": 0.9}, {"tie_word_embeddings": False}])
def test_every_array_of_a_state_has_a_rule(changes: dict[str, Any], scan: bool) -> None:
    config = recipe(**changes, scan=scan, bias=True)
    mesh = make_mesh()
    state = abstract_state(config, make_model(config), make_optimizer(config.optimizer, 6), mesh)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(state))


def test_every_rule_matches_a_parameter_with_as_many_axes() -> None:
    used = set()
    for parameter in parameters(GPT2Config(tie_word_embeddings=False)):
        path = "/".join(parameter.flax_path)
        matching = [k for k, (pattern, _) in enumerate(RULES) if re.search(rf"(^|/){pattern}$", path)]
        assert len(matching) == 1, path
        assert len(RULES[matching[0]][1]) == len(parameter.flax_shape), path
        used |= {*matching}
    assert used == {*range(len(RULES))}


def test_stacked_layers_are_sharded_like_single_ones() -> None:
    assert spec_of("h_3/mlp/c_fc/kernel", 2) == PartitionSpec("fsdp", "tensor")
    assert spec_of("h/mlp/c_fc/kernel", 3) == PartitionSpec(None, "fsdp", "tensor")
    assert spec_of("muon/h/mlp/c_fc/kernel", 3) == PartitionSpec(None, "fsdp", "tensor")
    assert spec_of("muon", 1) == PartitionSpec(), "coefficients of the optimizer"


@pytest.mark.parametrize(("path", "ndim"), [("h/mlp/c_gate/kernel", 3), ("wte/embedding", 4)])
def test_a_parameter_without_a_rule_is_an_error(path: str, ndim: int) -> None:
    with pytest.raises(KeyError, match="no rule"):
        spec_of(path, ndim)


# What is refused


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("model=2", "write data="),
        ("data", "write data="),
        ("data=0", "write data="),
        ("data=-2", "write data="),
        ("data=1,data=1", "write data="),
        ("data=-1,fsdp=-1", "only one axis may be -1"),
        ("data=2", "2 devices, and there are 1"),
        ("data=-1,tensor=3", "3 does not divide the 1 devices"),
    ],
)
def test_invalid_meshes_are_refused(wanted: str, message: str) -> None:
    with pytest.raises(MeshError, match=re.escape(message)) as refused:
        make_mesh(wanted, jax.devices()[:1])
    assert isinstance(refused.value, BridgeError)
    assert f"--mesh {wanted}" in str(refused.value)


class FakeMesh:
    """A mesh shape without devices."""

    def __init__(self, **sizes: int) -> None:
        self.shape = {"data": 1, "fsdp": 1, "tensor": 1, **sizes}


def test_a_mesh_that_does_not_divide_the_model_is_refused_by_shape_and_axis() -> None:
    embeddings = {"wte": {"embedding": np.zeros((71, 6))}, "wpe": {"embedding": np.zeros((5, 6))}}
    tree = {**embeddings, "h_0": {"attn": {"c_attn": {"kernel": np.zeros((6, 3, 5, 1))}}}}
    with pytest.raises(MeshError) as refused:
        shardings(tree, FakeMesh(tensor=2, fsdp=4))  # type: ignore[arg-type]
    for line in (
        "wte/embedding has shape (71, 6), and tensor=2 x fsdp=4 does not divide 71; pad the vocabulary, with "
        "--vocab-multiple 8 or a multiple of it",
        "wpe/embedding has shape (5, 6), and fsdp=4 does not divide 6\n",
        "h_0/attn/c_attn/kernel has shape (6, 3, 5, 1), and tensor=2 does not divide 5",
    ):
        assert line in str(refused.value)


@pytest.mark.parametrize("rows", [batch_rows, microbatch_rows])
@pytest.mark.parametrize(
    ("batch_size", "cure"), [(4, "--num-microbatches 1"), (24, "--num-microbatches 3"), (6, "--batch-size 8")]
)
def test_rows_that_the_mesh_does_not_divide_are_refused_with_a_remedy(rows: Any, batch_size: int, cure: str) -> None:
    config = recipe(batch_size=batch_size, num_microbatches=4 if batch_size == 24 else 2)
    with pytest.raises(TrainingError, match=rf"rows per microbatch.* = 4 does not divide; choose {cure}, or another"):
        rows(config, FakeMesh(data=2, fsdp=2))


class FakeDevice:
    """A device of a machine or of a TPU slice."""

    def __init__(self, platform: str, slice_index: int, number: int) -> None:
        self.platform, self.slice_index, self.id, self.process_index = platform, slice_index, number, slice_index
        self.device_kind = "fake"


@pytest.mark.parametrize("wanted", ["fsdp=-1", "tensor=2,fsdp=8", "data=2,fsdp=8"])
def test_any_axis_may_span_the_machines_of_gpus(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX numbers the machines of GPUs as it numbers slices."""
    monkeypatch.setattr("gpt2_jax.parallel.sharding.Mesh", lambda grid, *_, **__: grid)
    devices = [FakeDevice("gpu", number // 8, number) for number in range(16)]
    assert make_mesh(wanted, devices).size == 16


def test_tpu_slices_are_split_by_data_only() -> None:
    devices = [FakeDevice("tpu", number // 8, number) for number in range(16)]
    with pytest.raises(MeshError, match="data=1 must be a multiple of the number of slices, 2"):
        make_mesh("fsdp=-1", devices)


def test_a_part_of_a_checkpoint_is_read_by_its_rows(tmp_path: Path) -> None:
    """The test reads like a process with one of several devices, from its first row to its last."""
    sources = tmp_path / "sources"
    config = replace(on_meshes.MODEL, vocab_size=70, activation_function="gelu_new")
    state = random_checkpoint(config).tensors
    for format in WRITABLE:
        wanted = config_for(format, config)
        bridge.save(Checkpoint.of(dict(state.items()), wanted), sources / format, format=format)
        entries = bridge.load(sources / format).tensors.entries
        for parameter in parameters(wanted):
            whole = state[parameter.torch_name].reshape(parameter.flax_shape)
            shape = (72 if parameter.has_vocabulary_rows else whole.shape[0], *whole.shape[1:])
            padded = np.zeros(shape, np.float32)
            padded[: len(whole)] = whole
            stored = _Stored(parameter.torch_name, entries[parameter.torch_name], whole.shape, shape, False)
            for start in range(0, shape[0], max(1, shape[0] // 3)):
                part = (slice(start, min(shape[0], start + shape[0] // 3 + 1)), *(slice(0, n) for n in shape[1:]))
                found = np.full(padded[part].shape, np.nan, np.float32)
                stored.copy_into([(part, found)])
                np.testing.assert_array_equal(found, padded[part])


def test_only_the_needed_rows_are_read(tmp_path: Path) -> None:
    bridge.save(random_checkpoint(on_meshes.MODEL), tmp_path / "source", format="huggingface")
    entry = bridge.load(tmp_path / "source").tensors.entries["h.0.mlp.c_fc.weight"]
    assert entry.read_rows is not None
    np.testing.assert_array_equal(replace(entry, read=None).rows(3, 7), entry.read()[3:7])  # type: ignore[arg-type]
    np.testing.assert_array_equal(entry.rows(0, len(entry.read())), entry.read())


@pytest.mark.mesh
def test_foreign_meshes_are_not_used(tmp_path: Path) -> None:
    """Meshes with other axis names, with some of our names, and inside a `shard_map` over one of them."""
    found = on_eight_devices("foreign_meshes", tmp_path)
    for name, (difference, rows) in found.items():
        assert difference < 1e-6, name
        assert rows == 2, (name, "each device has its own rows")


@pytest.mark.mesh
def test_explicit_meshes_work_inside_auto_axes(tmp_path: Path) -> None:
    found = on_eight_devices("explicit_meshes", tmp_path)
    assert found["loss"] < 1e-6
    assert found["gradients"] < 1e-5
    assert found["spec"] == "tensor"


def test_a_batch_keeps_its_rows_on_the_mesh() -> None:
    rows = Rows(4, make_mesh("data=1", jax.devices()[:1]))
    batch = {"input_ids": np.arange(12, dtype=np.int32).reshape(4, 3)}
    assert rows.own == slice(0, 4)
    np.testing.assert_array_equal(rows.put(batch)["input_ids"], batch["input_ids"])

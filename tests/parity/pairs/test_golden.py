"""A golden replaces the side that it was made from, and a damaged one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from parity.pairs import mlp
from parity.pairs.test_compare import failures

from bridge import BridgeError
from bridge.containers.safetensors import read_file, write_file
from bridge.storage.tensors import LazyTensorMap
from gpt2_jax.parity.pairs.compare import compare
from gpt2_jax.parity.pairs.sides import golden
from gpt2_jax.parity.pairs.sides.flax_module import linen_side
from gpt2_jax.parity.pairs.sides.golden import GoldenError, golden_side, save_golden


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("golden") / "mlp.golden"
    save_golden(path, mlp.function_mlp_side(), mlp.inputs())
    return path


def test_a_golden_replaces_the_side(saved: Path) -> None:
    side = golden_side(saved)
    assert side.name == "golden of jax"
    assert {"python", "numpy", "jax", "gpt2-bridge"} <= {*side.versions}
    report = compare(side, mlp.linen_mlp_side(), side.inputs)
    assert failures(report) == {}
    assert [check.name for check in report.checks if check.skipped] == ["parameters", "gradients", "state"]
    assert report.checks[3].measurements[0].name == "fp64 max difference of 3 intermediates / tolerance"


def test_a_golden_finds_a_wrong_weight(saved: Path) -> None:
    params = mlp.weights()
    params["fc1"]["bias"][2] += 1e-6
    report = compare(golden_side(saved), linen_side(mlp.LinenMLP(), {"params": params}), mlp.inputs())
    assert report.checks[3].first_divergence.startswith("fc1 at [")
    assert report.checks[3].first_divergence.endswith("4 of 32 elements, with axis 1 = 2")


def test_without_intermediates(saved: Path, tmp_path: Path) -> None:
    save_golden(tmp_path / "g", mlp.function_mlp_side(), mlp.inputs(), intermediates=False)
    assert (tmp_path / "g").stat().st_size < saved.stat().st_size
    assert golden_side(tmp_path / "g").forward(mlp.inputs(), "float64").intermediates == {}


def test_other_inputs_are_refused(saved: Path) -> None:
    with pytest.raises(GoldenError, match="its own inputs only"):
        golden_side(saved).forward(mlp.inputs(seed=5), "float64")


def test_only_a_golden_is_overwritten(saved: Path, tmp_path: Path) -> None:
    side, path = mlp.function_mlp_side(), tmp_path / "g"
    save_golden(path, side, mlp.inputs())
    with pytest.raises(BridgeError, match="exists"):
        save_golden(path, side, mlp.inputs())
    save_golden(path, side, mlp.inputs(seed=3), overwrite=True)
    assert np.array_equal(golden_side(path).inputs[0], mlp.inputs(seed=3)[0])
    path.write_text("mine")
    with pytest.raises(BridgeError, match="exists"):
        save_golden(path, side, mlp.inputs(), overwrite=True)
    assert path.read_text() == "mine"


def test_large_arrays_are_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "MOST_BYTES", 100)
    with pytest.raises(GoldenError, match="the limit is 100"):
        save_golden(tmp_path / "g", mlp.function_mlp_side(), mlp.inputs())
    assert [*tmp_path.iterdir()] == []


CHANGES = {
    "another kind": ({"kind": "x"}, {}, "is not a golden"),
    "another version": ({"version": "7"}, {}, "version '7'"),
    "no JSON": ({"description": "{"}, {}, "is not valid JSON"),
    "many values": (
        {"description": json.dumps({"side": "a", "versions": {str(k): "" for k in range(5000)}})},
        {},
        "more than",
    ),
    "no side": ({"description": '{"versions": {}}'}, {}, "name of a side"),
    "no inputs": ({}, {"inputs/0": None}, "inputs must be"),
    "a gap in the inputs": ({}, {"inputs/2": np.zeros(1)}, "inputs must be"),
    "no outputs": ({}, {"float64/outputs/output": None}, "no outputs in float64"),
    "another dtype": ({}, {"float64/outputs/output": np.zeros(3, np.float32)}, "must hold float64"),
    "NaN": ({}, {"float64/outputs/output": np.full(3, np.nan)}, "not numbers"),
    "an unknown array": ({}, {"float16/outputs/output": np.zeros(3)}, "1 arrays that are neither"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_malformed_golden_is_refused(saved: Path, tmp_path: Path, change: str) -> None:
    tensors, metadata = read_file(saved)
    new_metadata, new_arrays, message = CHANGES[change]
    arrays = {name: tensors[name] for name in tensors} | new_arrays
    arrays = {name: array for name, array in arrays.items() if array is not None}
    write_file(tmp_path / "g", LazyTensorMap.of(arrays), {**metadata, **new_metadata})
    with pytest.raises(GoldenError, match=message):
        golden_side(tmp_path / "g")


def test_every_truncation_and_changed_byte_of_the_header_is_refused_or_harmless(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "g"
    for length in rng.integers(0, len(content), 50):
        path.write_bytes(content[:length])
        with pytest.raises(BridgeError):
            golden_side(path)
    header = 8 + int.from_bytes(content[:8], "little")
    for position in rng.integers(0, header, 200):
        path.write_bytes(content[:position] + bytes([rng.integers(256)]) + content[position + 1 :])
        try:
            golden_side(path)
        except BridgeError:
            continue


def test_a_large_file_is_refused_by_its_size(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "MOST_BYTES", -(2**20) + 100)
    with pytest.raises(GoldenError, match="a golden at most"):
        golden_side(saved)

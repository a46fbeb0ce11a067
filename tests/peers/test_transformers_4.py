"""Files in the format `flax_msgpack`, read and written again by transformers 4.57.6 in a separate environment.

transformers 5 does not support Flax, and two versions cannot be installed together. `make test-peers` creates the
environment and sets PEERS_PYTHON to its interpreter.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import flax.serialization
import flax.traverse_util
import ml_dtypes
import numpy as np
import pytest
import torch
from support.models import TINY, random_checkpoint, random_ids

import bridge
import gpt2_torch
from bridge import GPT2Config

pytestmark = pytest.mark.peers

SAME_FP32 = 2e-5
"""Tolerance for logits of size 1 to 10: the order of the float32 sums differs."""

VARIANTS: dict[str, GPT2Config] = {
    "tied": TINY,
    "untied": replace(TINY, tie_word_embeddings=False),
    "epsilon": replace(TINY, layer_norm_epsilon=0.05),
    "default n_inner": replace(TINY, n_inner=None),
    **{
        name: replace(TINY, activation_function=name)
        for name in ("gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish", "tanh")
    },
}


@pytest.fixture(scope="module")
def python() -> str:
    if "PEERS_PYTHON" not in os.environ:
        pytest.skip("PEERS_PYTHON is not set to an interpreter with transformers 4; run make test-peers")
    return os.environ["PEERS_PYTHON"]


def by_transformers(python: str, source: Path, ids: np.ndarray, target: Path, *options: str) -> np.ndarray:
    """Return the logits of transformers for `source`, and let it save the model again as `target`."""
    np.save(source.parent / "ids.npy", ids)
    arguments = [source, source.parent / "ids.npy", source.parent / "logits.npy", target, *options]
    ended = subprocess.run(
        [python, Path(__file__).with_name("resave.py"), *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "newly initialized" not in ended.stderr and "were not used" not in ended.stderr, ended.stderr
    return np.load(source.parent / "logits.npy")


def leaves_of(directory: Path) -> dict[str, np.ndarray]:
    leaves = {}
    for file in directory.glob("flax_model*.msgpack"):
        leaves |= flax.traverse_util.flatten_dict(flax.serialization.msgpack_restore(file.read_bytes()), sep="/")
    return leaves


def assert_same_function_and_bytes(
    python: str,
    folder: Path,
    config: GPT2Config,
    dtype: type = np.float32,
    our_shards: int = 10**9,
    theirs: str = "1GB",
) -> None:
    """Assert that transformers computes the reference's logits from a written file, and saves identical arrays."""
    ckpt = random_checkpoint(config, dtype)
    bridge.save(ckpt, folder / "ours", format="flax_msgpack", max_shard_bytes=our_shards)
    ids = random_ids(config)
    logits = by_transformers(python, folder / "ours", ids, folder / "theirs", theirs)
    with torch.no_grad():
        expected = gpt2_torch.model_from_checkpoint(ckpt).float().eval()(torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=SAME_FP32)
    ours, saved = leaves_of(folder / "ours"), leaves_of(folder / "theirs")
    assert ours.keys() == saved.keys()
    for path, array in ours.items():
        assert (array.dtype, array.shape) == (saved[path].dtype, saved[path].shape), path
        assert array.tobytes() == saved[path].tobytes(), path
    again = bridge.load(folder / "theirs")
    assert (again.format, again.config) == ("flax_msgpack", config)
    assert bridge.fingerprint(again.tensors) == bridge.fingerprint(ckpt.tensors)


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_4_computes_and_saves_the_same(python: str, tmp_path: Path, name: str) -> None:
    assert_same_function_and_bytes(python, tmp_path, VARIANTS[name])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=lambda d: d.__name__)
def test_half_precision_is_kept_bit_for_bit(python: str, tmp_path: Path, dtype: type) -> None:
    assert_same_function_and_bytes(python, tmp_path, VARIANTS["untied"], dtype)


@pytest.mark.parametrize(("our_shards", "theirs"), [(100_000, "1GB"), (10**9, "100KB"), (1, "1KB")])
def test_shards_of_either_program_are_read(python: str, tmp_path: Path, our_shards: int, theirs: str) -> None:
    assert_same_function_and_bytes(python, tmp_path, TINY, our_shards=our_shards, theirs=theirs)

"""The base of a run that trains a part of the weights: a LoRA adapter, or the parameters that are not frozen.

The base is stored once, in `RUN/base`, and the checkpoints contain only the trained part. The manifest of each
checkpoint records the SHA-256 of the base's weights, so a base of another run is detected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bridge.adapters.lora import LoRA, LoRAUpdate, merge_lora
from bridge.checkpoint import Checkpoint
from bridge.config import GPT2Config
from bridge.containers.safetensors import read_file, write_file
from bridge.conversion import canonicalize, differences
from bridge.errors import CheckpointError, ConversionError, bullet_list, quoted
from bridge.formats.directory import reshaped
from bridge.parameter_table import parameters
from bridge.storage import manifest
from bridge.storage.tensors import LazyTensor, LazyTensorMap, transposed

BASE = "base"
_WEIGHTS = "model.safetensors"
_FLOAT32 = np.dtype(np.float32)
_MOST_ALPHA = 2**31


def write_base(directory: Path, base: Checkpoint) -> None:
    """Write the weights of the base into an empty directory, in float32 as they are trained, with a manifest."""
    tensors = LazyTensorMap({name: _in_float32(entry) for name, entry in base.tensors.entries.items()})
    write_file(directory / _WEIGHTS, tensors, {"format": "pt"})
    manifest.commit(directory, {})


def base_digest(run: Path) -> str:
    """Return the SHA-256 of the base's weights that its manifest records."""
    return manifest.recorded_sha256(run / BASE, _WEIGHTS)


def read_base(run: Path, config: GPT2Config) -> LazyTensorMap:
    """Verify the base of a run and return its tensors, which are read on access.

    Raises `CheckpointError` if it is missing or damaged, and `ConversionError` if it belongs to another model.
    """
    manifest.verify(run / BASE)
    return canonicalize(read_file(run / BASE / _WEIGHTS)[0], config)


def is_partial(about: Mapping[str, Any]) -> bool:
    """Whether the checkpoint with this `about` contains only a part of the weights."""
    config = about.get("config")
    return isinstance(config, dict) and bool(config.get("lora_rank") or config.get("freeze") is not None)


def with_base(
    run: Path, about: Mapping[str, Any], trained: Mapping[str, LazyTensor], config: GPT2Config
) -> LazyTensorMap:
    """Return the tensors of the whole model: the base, with the trained part replaced or merged in.

    Args:
        about: the field `about` of the checkpoint's manifest.
        trained: path in the Flax tree, with unstacked layers and without padding of the vocabulary -> tensor.

    Raises `CheckpointError` or `ConversionError` if the base is not that of the checkpoint, or the trained part does
    not fit it.
    """
    base = read_base(run, config)
    if about.get("base") != base_digest(run):
        raise CheckpointError(f"{quoted(run / BASE)} is not the base that this checkpoint was trained on")
    if about["config"].get("lora_rank"):
        return merge_lora(Checkpoint(config, base, "memory"), adapter(about, trained, config)).tensors
    expected = {"/".join(p.flax_path): p for p in parameters(config) if "/".join(p.flax_path) in trained}
    if problems := differences({path: p.flax_shape for path, p in expected.items()}, trained):
        raise ConversionError("the checkpoint does not fit its run:\n" + bullet_list(problems))
    own = {p.torch_name: reshaped(trained[path], p.torch_shape) for path, p in expected.items()}
    return LazyTensorMap({**base.entries, **own})


def adapter(about: Mapping[str, Any], trained: Mapping[str, LazyTensor], config: GPT2Config) -> LoRA:
    """Return the adapter of a checkpoint. The arguments and errors are those of `with_base`."""
    alpha, is_stabilized = (about["config"].get(name) for name in ("lora_alpha", "lora_rslora"))
    is_number = type(alpha) in (int, float) and abs(alpha) <= _MOST_ALPHA  # False for NaN
    if not is_number or type(is_stabilized) is not bool:
        raise CheckpointError(
            f"lora_alpha={quoted(alpha)}, lora_rslora={quoted(is_stabilized)}: not those of a run; alpha "
            "must be a number, and rslora true or false. Read another checkpoint of the run"
        )
    names = {"/".join(p.flax_path[:-1]): p.torch_name for p in parameters(config) if p.is_projection}
    factors = {f"{module}/{name}": module for module in names for name in "ab"}
    problems = [f"{quoted(path)} is not a factor of an adapter" for path in trained if path not in factors]
    problems += [f"{path} has shape {entry.shape}" for path, entry in trained.items() if len(entry.shape) < 2]
    modules = dict.fromkeys(factors[path] for path in trained if path in factors)
    problems += [f"{m}/{name} is missing" for m in modules for name in "ab" if f"{m}/{name}" not in trained]
    if problems:
        raise ConversionError("the checkpoint does not have an adapter:\n" + bullet_list(problems, limit=20))
    updates = {}
    for module in modules:
        a, b = trained[f"{module}/a"], trained[f"{module}/b"]
        a_2d = reshaped(a, (math.prod(a.shape[:-1]), a.shape[-1]))
        b_2d = reshaped(b, (b.shape[0], math.prod(b.shape[1:])))
        updates[names[module]] = LoRAUpdate(transposed(a_2d), transposed(b_2d), alpha, is_stabilized)
    return LoRA(updates)


def _in_float32(entry: LazyTensor) -> LazyTensor:
    if entry.dtype == _FLOAT32:
        return entry
    return LazyTensor(_FLOAT32, entry.shape, lambda: entry.read().astype(_FLOAT32))

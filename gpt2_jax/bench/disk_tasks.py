"""Benchmark tasks without a framework: converting a checkpoint, and `cp` of the same bytes. Both wait for the disk."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import bridge
from bridge import Checkpoint, GPT2Config
from bridge.storage.tensors import LazyTensor, LazyTensorMap

Action = Callable[[], Any]


def import_packages(name: str) -> None:
    """Does nothing: this module imports all packages at its top."""


def prepare(job: dict[str, Any]) -> tuple[Action, Action]:
    source = Path(job["directory"])
    target = source.with_name(f"{job['name']} of {source.name}")
    if job["name"] == "cp":
        return partial(copy_to_disk, source / "model.safetensors", target), lambda: target.unlink()
    return partial(_convert, source, target), lambda: shutil.rmtree(target)


def device_info() -> dict[str, Any]:
    return {"device": "disk", "device_peak_bytes": None}


def _convert(source: Path, target: Path) -> None:
    bridge.save(bridge.load(source), target, format="flax")


def copy_to_disk(source: Path, target: Path) -> None:
    """Run `cp` and wait until the data are on disk, as `bridge.save` does."""
    subprocess.run(["cp", source, target], check=True)
    subprocess.run(["sync", target], check=True)


def write_checkpoint(path: Path, config: GPT2Config) -> Path:
    """Write a Hugging Face checkpoint in one file. The values are generated while writing, to save memory."""
    entries = {
        p.torch_name: LazyTensor(np.dtype("f4"), p.torch_shape, partial(_values, p.torch_shape, number))
        for number, p in enumerate(bridge.parameters(config))
    }
    bridge.save(
        Checkpoint(config, LazyTensorMap(entries), "memory"), path, format="huggingface", max_shard_bytes=10**11
    )
    return path


def _values(shape: tuple[int, ...], number: int) -> np.ndarray:
    """An array of `number`, with a counter at every thousandth element, so that transposed tensors are detected."""
    values = np.full(math.prod(shape), number, np.float32)
    values[::1000] = np.arange(len(values[::1000]))
    return values.reshape(shape)

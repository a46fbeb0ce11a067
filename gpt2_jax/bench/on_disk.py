"""Converting a checkpoint, beside `cp` of the same bytes; both end with the data on the disk. No framework runs."""

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


def imports(name: str) -> None:
    """All is imported above."""


def prepare(job: dict[str, Any]) -> tuple[Action, Action]:
    source = Path(job["directory"])
    target = source.with_name(f"{job['name']} of {source.name}")
    if job["name"] == "cp":
        return partial(copy_to_disk, source / "model.safetensors", target), lambda: target.unlink()
    return partial(_convert, source, target), lambda: shutil.rmtree(target)


def about() -> dict[str, Any]:
    return {"device": "disk", "device_peak_bytes": None}


def _convert(source: Path, target: Path) -> None:
    bridge.save(bridge.load(source), target, format="flax")


def copy_to_disk(source: Path, target: Path) -> None:
    """`cp`, and wait until the data are on the disk, as `bridge.save` does."""
    subprocess.run(["cp", source, target], check=True)
    subprocess.run(["sync", target], check=True)


def write_checkpoint(path: Path, config: GPT2Config) -> Path:
    """One Hugging Face file with a different number in every tensor; it is made as it is written."""
    entries = {
        p.torch_name: LazyTensor(np.dtype("f4"), p.torch_shape, partial(_values, p.torch_shape, number))
        for number, p in enumerate(bridge.parameters(config))
    }
    bridge.save(
        Checkpoint(config, LazyTensorMap(entries), "memory"), path, format="huggingface", max_shard_bytes=10**11
    )
    return path


def _values(shape: tuple[int, ...], number: int) -> np.ndarray:
    """One number, but for every thousandth, so that a wrong turn or place changes the fingerprint."""
    values = np.full(math.prod(shape), number, np.float32)
    values[::1000] = np.arange(len(values[::1000]))
    return values.reshape(shape)

"""This project's Flax directory, read by the `safetensors` package and converted here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from support.models import SMALLEST, random_checkpoint

import bridge

_TORCH_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def samples(folder: Path) -> list[Path]:
    bridge.save(random_checkpoint(SMALLEST), folder / "flax", format="flax")
    return [folder / "flax"]


def mutable(source: Path) -> list[Path]:
    return [source / "flax_model.safetensors"]


def oracle(source: Path) -> dict[str, np.ndarray]:
    arrays = {}
    for path, array in load_file(source / "flax_model.safetensors").items():
        *modules, kind = path.split("/")
        if "c_attn" in modules:  # [D, 3, H, K] or [3, H, K]; torch has one axis for 3, H and K
            array = array.reshape(*array.shape[:-3], -1)
        elif kind == "kernel" and array.ndim == 3:  # [H, K, D]
            array = array.reshape(-1, array.shape[-1])
        arrays[".".join([*modules, _TORCH_NAMES[kind]]).replace("h_", "h.", 1)] = array
    return arrays

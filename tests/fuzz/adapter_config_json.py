"""`adapter_config.json` of a LoRA adapter, beside its weights."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
from fuzz import json_damage
from support.models import huggingface_directory
from support.peft_adapters import ADAPTERS, COMMITTED, FILES

import bridge
from bridge.adapters.peft_config import FILE


def samples(folder: Path) -> list[Path]:
    for name in COMMITTED:
        shutil.copytree(FILES / name.replace(" ", "-"), folder / name)
        huggingface_directory(folder / f"base of {name}", ADAPTERS[name][0])
    return [folder / name for name in COMMITTED]


def mutable(source: Path) -> list[Path]:
    return [source / FILE]


def damage(content: bytes, file: Path, rng: random.Random) -> bytes:
    return json_damage.damaged_json(content, rng)


def judge(source: Path) -> str:
    """What loads has the shapes of its base and finite weights."""
    base = source.parent / f"base of {source.name}"
    try:
        merged = bridge.load(source, base=base)
    except bridge.BridgeError:
        return "refused"
    assert merged.config == bridge.load(base).config
    assert all(np.isfinite(array).all() for array in merged.tensors.values())
    return "loaded"

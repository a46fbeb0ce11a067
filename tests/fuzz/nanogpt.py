"""nanoGPT's checkpoints, written by torch and by this project, and read by `torch.load`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from support.models import SMALLEST, random_checkpoint
from support.nanogpt_model import adamw, checkpoint, random_model, step

import bridge
from gpt2_torch.arrays import array_from_tensor

_ARGS = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 5, "bias": False, "vocab_size": 11, "dropout": 0.0}


def samples(folder: Path) -> list[Path]:
    model = random_model(**_ARGS)
    optimizer = adamw(model)
    step(model, optimizer, torch.arange(6)[None] % 11)
    torch.save(checkpoint(model, optimizer, _ARGS), folder / "trained.pt")
    torch.save(checkpoint(random_model(**{**_ARGS, "bias": True}), None, {**_ARGS, "bias": True}), folder / "model.pt")
    config = replace(SMALLEST, n_inner=None, activation_function="gelu")
    bridge.save(random_checkpoint(config, ml_dtypes.bfloat16), folder / "ours.pt", format="nanogpt")
    return [folder / "trained.pt", folder / "model.pt", folder / "ours.pt"]


def mutable(source: Path) -> list[Path]:
    return [source]


def repair(source: Path) -> None:
    """Mark the checksum of every record as not computed, as torch does on request."""
    content = source.read_bytes()
    for header, checksum in ((b"PK\3\4", 14), (b"PK\1\2", 16)):
        content = re.sub(header + b"(?s:.{%d})" % checksum, _without_checksum, content)
    source.write_bytes(content)


def _without_checksum(found: re.Match[bytes]) -> bytes:
    return found[0][:-4] + bytes(4)


def oracle(source: Path) -> dict[str, np.ndarray]:
    arrays = {}
    for name, tensor in torch.load(source, weights_only=True)["model"].items():
        array = array_from_tensor(tensor)
        is_linear = re.search(r"(c_attn|c_proj|c_fc)\.weight$", name)
        arrays[name.removeprefix("transformer.")] = array.T if is_linear else array
    del arrays["lm_head.weight"]
    return arrays

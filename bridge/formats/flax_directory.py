"""This project's own directory: `config.json` and the Flax tree in one safetensors file.

Tensor names are the tree's paths (`h_0/attn/c_attn/kernel`), shapes are Flax's, one layer at a time;
`flax.traverse_util.unflatten_dict(safetensors.flax.load_file(file), sep="/")` gives the parameter tree
without this project.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from bridge.arrays import LazyTensors, TensorEntry
from bridge.checkpoint import Checkpoint
from bridge.config import GPT2Config, harmless_fields
from bridge.convert import differences
from bridge.errors import ConversionError, bullet_list, quoted
from bridge.formats.directory import CONFIG, carry_files, read_json, write_json
from bridge.params import parameters
from bridge.safetensors_file import read_file, write_file

NAME = "flax"
WEIGHTS = "flax_model.safetensors"


def sniff(path: Path) -> bool:
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> Checkpoint:
    fields = read_json(path / CONFIG)
    has_bias = fields.pop("bias", True)  # the one setting that Hugging Face's GPT-2 does not have
    config = replace(GPT2Config.from_hf(fields), bias=has_bias)
    stored = read_file(path / WEIGHTS)[0].entries
    expected = {"/".join(p.flax_path): p for p in parameters(config)}
    if problems := differences({path: p.flax_shape for path, p in expected.items()}, stored):
        raise ConversionError(f"{quoted(path / WEIGHTS)}:\n" + bullet_list(problems))
    tensors = {p.torch_name: _reshaped(stored[name], p.torch_shape) for name, p in expected.items()}
    return Checkpoint(config, LazyTensors(tensors), NAME, path, harmless_fields(fields))


def write(checkpoint: Checkpoint, directory: Path) -> None:
    config = checkpoint.config
    fields = replace(config, bias=True).to_hf(checkpoint.extra)
    write_json(directory / CONFIG, fields if config.bias else {**fields, "bias": False})
    entries = {
        "/".join(p.flax_path): _reshaped(checkpoint.tensors.entries[p.torch_name], p.flax_shape)
        for p in parameters(config)
    }
    write_file(directory / WEIGHTS, LazyTensors(entries), {"format": "flax"})
    carry_files(checkpoint, directory)


def _reshaped(entry: TensorEntry, shape: tuple[int, ...]) -> TensorEntry:
    def read(inner: Callable[[], np.ndarray] = entry.read) -> np.ndarray:
        return inner().reshape(shape)

    return TensorEntry(entry.dtype, shape, read)

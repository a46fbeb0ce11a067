"""This project's own directory: `config.json` and the Flax tree in one safetensors file.

Tensor names are the tree's paths (`h_0/attn/c_attn/kernel`), shapes are Flax's, one layer at a time;
`flax.traverse_util.unflatten_dict(safetensors.flax.load_file(file), sep="/")` gives the parameter tree
without this project.
"""

from __future__ import annotations

from pathlib import Path

from bridge.arrays import LazyTensors
from bridge.checkpoint import Checkpoint
from bridge.config import harmless_fields
from bridge.formats.directory import CONFIG, carry_files, read_config, reshaped, tensors_of_tree, write_config
from bridge.params import parameters
from bridge.safetensors_file import read_file, write_file

NAME = "flax"
WEIGHTS = "flax_model.safetensors"
WRITES = r"flax_model\.safetensors"


def sniff(path: Path) -> bool:
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> Checkpoint:
    config, fields = read_config(path / CONFIG)
    tensors = tensors_of_tree(read_file(path / WEIGHTS)[0].entries, config, path / WEIGHTS)
    return Checkpoint(config, tensors, NAME, path, harmless_fields(fields))


def write(checkpoint: Checkpoint, directory: Path) -> None:
    config = checkpoint.config
    write_config(directory / CONFIG, config, checkpoint.extra)
    entries = {
        "/".join(p.flax_path): reshaped(checkpoint.tensors.entries[p.torch_name], p.flax_shape)
        for p in parameters(config)
    }
    write_file(directory / WEIGHTS, LazyTensors(entries), {"format": "flax"})
    carry_files(checkpoint, directory)

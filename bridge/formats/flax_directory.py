"""This project's own directory: `config.json` and the Flax tree in one safetensors file.

Tensor names are the paths of the tree (`h_0/attn/c_attn/kernel`), shapes are Flax's, and layers are not stacked.
`flax.traverse_util.unflatten_dict(safetensors.flax.load_file(file), sep="/")` returns the parameter tree without this
project.
"""

from __future__ import annotations

import re
from pathlib import Path

from bridge.checkpoint import Checkpoint
from bridge.config import config_diagnostics, harmless_fields
from bridge.containers.safetensors import header_names, read_file, write_file
from bridge.formats.directory import (
    CONFIG,
    carry_files,
    config_beside,
    files_beside_config,
    read_config,
    reshaped,
    tensors_of_tree,
    write_config,
)
from bridge.formats.format import Format
from bridge.parameter_table import parameters
from bridge.storage.tensors import LazyTensorMap

NAME = "flax"
WEIGHTS = "flax_model.safetensors"

_A_LEAF = "wte/embedding"  # a name that never occurs in a state_dict


def find(path: Path) -> list[Path]:
    if path.is_dir():
        return files_beside_config(path, (WEIGHTS,))
    return [path] if header_names(path, _A_LEAF) else []


def read(weights: Path) -> Checkpoint:
    config, fields = read_config(config_beside(weights))
    tensors = tensors_of_tree(read_file(weights)[0].entries, config, weights)
    return Checkpoint(config, tensors, NAME, weights.parent, harmless_fields(fields), config_diagnostics(fields))


def write(checkpoint: Checkpoint, directory: Path) -> None:
    config = checkpoint.config
    write_config(directory / CONFIG, config, checkpoint.extra)
    entries = {
        "/".join(p.flax_path): reshaped(checkpoint.tensors.entries[p.torch_name], p.flax_shape)
        for p in parameters(config)
    }
    write_file(directory / WEIGHTS, LazyTensorMap(entries), {"format": "flax"})
    carry_files(checkpoint, directory)


FORMAT = Format(name=NAME, find=find, read=read, write=write, weight_files=re.escape(WEIGHTS))

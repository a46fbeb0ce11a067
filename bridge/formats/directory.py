"""What formats that are a directory with a `config.json` have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bridge.arrays import LazyTensors, TensorEntry
from bridge.checkpoint import Checkpoint
from bridge.companions import checked_companion, has_companion, read_json_companion
from bridge.config import GPT2Config
from bridge.convert import differences
from bridge.errors import ConversionError, bullet_list, quoted
from bridge.params import parameters
from bridge.tokenizer import TOKENIZER_FILES
from bridge.tokenizer_files import save_tokenizer

CONFIG = "config.json"
CARRIED_FILES = (*TOKENIZER_FILES, "generation_config.json")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a companion of the weights; `CheckpointError` if it is anything else."""
    return read_json_companion(path.parent, path.name)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def carry_files(checkpoint: Checkpoint, directory: Path) -> None:
    """Write the tokenizer that was inside the weights' file, or copy the tokenizer's files and generation settings.

    Raises `CheckpointError` or `TokenizerError` for files that are not carried: see `bridge.companions`.
    """
    if checkpoint.own_tokenizer is not None:
        save_tokenizer(checkpoint.own_tokenizer(), directory)
        return
    if checkpoint.path is None:
        return
    for name in CARRIED_FILES:
        if has_companion(checkpoint.path, name):
            (directory / name).write_bytes(checked_companion(checkpoint.path, name, checkpoint.config.vocab_size))


def read_config(path: Path) -> tuple[GPT2Config, dict[str, Any]]:
    """The configuration in this project's own directories, and the file's fields.

    They are Hugging Face's, and `bias`, the one setting that Hugging Face's GPT-2 does not have.
    """
    fields = read_json(path)
    has_bias = fields.pop("bias", True)
    return replace(GPT2Config.from_hf(fields), bias=has_bias), fields


def write_config(path: Path, config: GPT2Config, extra: Mapping[str, Any] | None = None) -> None:
    """What `read_config` reads."""
    fields = replace(config, bias=True).to_hf(extra)
    write_json(path, fields if config.bias else {**fields, "bias": False})


def tensors_of_tree(stored: Mapping[str, TensorEntry], config: GPT2Config, where: Path) -> LazyTensors:
    """The leaves of a Flax tree, one layer at a time, under their canonical names and in PyTorch's shapes.

    Args:
        stored: path in the tree (`h_0/attn/c_attn/kernel`) -> its leaf.
        where: the file, for the `ConversionError` that lists every leaf that does not fit.
    """
    expected = {"/".join(p.flax_path): p for p in parameters(config)}
    if problems := differences({path: p.flax_shape for path, p in expected.items()}, stored):
        raise ConversionError(f"{quoted(where)}:\n" + bullet_list(problems))
    return LazyTensors({p.torch_name: reshaped(stored[path], p.torch_shape) for path, p in expected.items()})


def reshaped(entry: TensorEntry, shape: tuple[int, ...]) -> TensorEntry:
    """The same tensor, seen in another shape when it is read."""

    def read(inner: Callable[[], np.ndarray] = entry.read) -> np.ndarray:
        return inner().reshape(shape)

    return TensorEntry(entry.dtype, shape, read)

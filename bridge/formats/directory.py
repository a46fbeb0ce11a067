"""Files of a checkpoint's directory: finding the weights, `config.json`, and files that are copied on conversion."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bridge.checkpoint import Checkpoint
from bridge.config import GPT2Config
from bridge.conversion import differences
from bridge.errors import CheckpointError, ConversionError, TokenizerError, bullet_list, quoted
from bridge.parameter_table import parameters
from bridge.storage.companions import checked_companion, has_companion, read_companion, read_json_companion
from bridge.storage.tensors import LazyTensor, LazyTensorMap
from bridge.tokenizers.chat.templates import CHAT_TEMPLATE, CHAT_TEMPLATE_FOLDER, chat_template_files
from bridge.tokenizers.loading import TOKENIZER_FILES, VOCABULARY_FILES, tokenizer_files_in
from bridge.tokenizers.readers.nanogpt import META, from_meta
from bridge.tokenizers.saving import save_tokenizer
from bridge.tokenizers.tokenizer import Tokenizer

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
CARRIED_FILES = (*TOKENIZER_FILES, META, GENERATION_CONFIG)
CARRIED_NAMES = "|".join([*map(re.escape, CARRIED_FILES), rf"{CHAT_TEMPLATE_FOLDER}/([^/]+\.jinja)?"])
"""A pattern for the relative paths of the files that are carried, and of their folders, which end with a slash."""


def files_by_content(path: Path, suffixes: Collection[str], recognised: Callable[[Path], bool]) -> list[Path]:
    """Return `path` if it is a `recognised` file, or the recognised files in a directory with one of the `suffixes`."""
    if path.is_dir():
        return [p for p in sorted(path.iterdir()) if p.suffix in suffixes and p.is_file() and recognised(p)]
    return [path] if path.is_file() and recognised(path) else []


def files_beside_config(directory: Path, names: Iterable[str]) -> list[Path]:
    """Return the files in `names` that exist in a directory with a `config.json`, in the order of `names`."""
    if not has_companion(directory, CONFIG):
        return []
    return [directory / name for name in names if (directory / name).is_file()]


def config_beside(weights: Path) -> Path:
    """Return the `config.json` beside `weights`. The weights alone do not determine the model."""
    config = weights.parent / CONFIG
    if not has_companion(weights.parent, CONFIG):
        raise CheckpointError(
            f"{quoted(weights)} holds tensors, but there is no {CONFIG} beside it; add the model's {CONFIG}, because "
            "the tensors alone do not determine the model"
        )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a companion of the weights. Raises `CheckpointError` if it holds anything else."""
    return read_json_companion(path.parent, path.name)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True)  # as transformers does, so that `diff` shows what changed
    path.write_text(text + "\n", encoding="utf-8")


def carry_files(checkpoint: Checkpoint, directory: Path) -> None:
    """Copy the tokenizer files and generation settings.

    If the weights file contains a tokenizer, and the files beside it are not the same one, this tokenizer is written in
    place of the files.

    Raises `CheckpointError` or `TokenizerError` for files that `bridge.storage.companions` rejects.
    """
    names = companions_of(checkpoint)
    if checkpoint.own_tokenizer is not None and not {*names} & {*VOCABULARY_FILES}:
        save_tokenizer(checkpoint.tokenizer(), directory)  # with its chat templates
        names = tuple(name for name in names if name == GENERATION_CONFIG)
    if checkpoint.path is None:
        return
    for name in names:
        if name != META:
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(checked_companion(checkpoint.path, name, checkpoint.config.vocab_size))
    is_written = checkpoint.own_tokenizer is not None or {*names} & {*VOCABULARY_FILES}
    made_of_meta = None if is_written else from_meta(checkpoint.path, checkpoint.progress)
    if made_of_meta is not None:
        if META in names:
            (directory / META).write_bytes(read_companion(checkpoint.path, META))
        if not {*names} & {*TOKENIZER_FILES}:
            save_tokenizer(made_of_meta, directory)


def _files_have(checkpoint: Checkpoint, tokenizer: Tokenizer) -> bool:
    """Whether the files beside the weights are this tokenizer: the same tokens, around and at the end of a text, too.

    The files may say more about a token, such as whether it is normalized.
    """
    try:
        beside = replace(checkpoint, own_tokenizer=None).tokenizer()
    except TokenizerError:
        return False
    return beside.source == checkpoint.path and _tokens(beside) == _tokens(tokenizer)


def _tokens(tokenizer: Tokenizer) -> tuple[Any, ...]:
    tokens = [tokenizer.token_of(i) for i in range(tokenizer.vocab_size)]
    return tokens, tokenizer.around, tokenizer.eos_token_ids


def companions_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the relative paths of the files beside the weights that belong to the checkpoint.

    These are the tokenizer files and generation settings or, if the weights file contains another tokenizer than the
    files, the chat templates and generation settings.
    """
    path = checkpoint.path
    if path is None:
        return ()
    if checkpoint.own_tokenizer is not None and not _files_have(checkpoint, checkpoint.own_tokenizer()):
        found = (CHAT_TEMPLATE, GENERATION_CONFIG)
        return (*(name for name in found if has_companion(path, name)), *chat_template_files(path))
    others = (name for name in (META, GENERATION_CONFIG) if has_companion(path, name))
    return (*tokenizer_files_in(path), *others)


def read_config(path: Path) -> tuple[GPT2Config, dict[str, Any]]:
    """Return the configuration in a `config.json` of this project, and the Hugging Face fields of the file.

    The file has Hugging Face's fields, and `bias: false` for a model without biases, which Hugging Face's GPT-2 does
    not have.
    """
    fields = read_json(path)
    bias = fields.get("bias", True)
    if bias is not True:  # `bias: true` is one of Hugging Face's fields, and kept
        del fields["bias"]
    return replace(GPT2Config.from_hf(fields), bias=bias), fields


def write_config(path: Path, config: GPT2Config, extra: Mapping[str, Any] | None = None) -> None:
    """Write the file that `read_config` reads."""
    fields = replace(config, bias=True).to_hf(extra)
    write_json(path, fields if config.bias else {**fields, "bias": False})


def tensors_of_tree(stored: Mapping[str, LazyTensor], config: GPT2Config, where: Path) -> LazyTensorMap:
    """Return the leaves of a Flax tree with unstacked layers, under canonical names and in PyTorch's shapes.

    Args:
        stored: path in the tree (`h_0/attn/c_attn/kernel`) -> leaf.
        where: the path of the file, for messages.

    Raises a `ConversionError` that lists every leaf that does not match the configuration.
    """
    expected = {"/".join(p.flax_path): p for p in parameters(config)}
    if problems := differences({path: p.flax_shape for path, p in expected.items()}, stored):
        raise ConversionError(f"{quoted(where)}:\n" + bullet_list(problems))
    return LazyTensorMap({p.torch_name: reshaped(stored[path], p.torch_shape) for path, p in expected.items()})


def reshaped(entry: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """Return the tensor, reshaped on read."""

    def read(inner: Callable[[], np.ndarray] = entry.read) -> np.ndarray:
        return inner().reshape(shape)

    return LazyTensor(entry.dtype, shape, read)

"""Files of a checkpoint's directory: finding the weights, `config.json`, and files that are copied on conversion."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bridge.checkpoint import GENERATION_CONFIG, Checkpoint
from bridge.config import GPT2Config
from bridge.conversion import differences
from bridge.errors import CheckpointError, ConversionError, TokenizerError, bullet_list, quoted
from bridge.parameter_table import parameters
from bridge.storage.companions import checked_companion, has_companion, read_json_companion
from bridge.storage.tensors import LazyTensor, LazyTensorMap
from bridge.tokenizers.byte_level_bpe import ByteLevelBPE
from bridge.tokenizers.chat.templates import CHAT_TEMPLATE, CHAT_TEMPLATE_FOLDER
from bridge.tokenizers.loading import TOKENIZER_FILES, VOCABULARY_FILES, tokenizer_files_in
from bridge.tokenizers.readers.nanogpt import META, from_meta
from bridge.tokenizers.saving import save_tokenizer
from bridge.tokenizers.tokenizer import Tokenizer

CONFIG = "config.json"
CARRIED_FILES = (*TOKENIZER_FILES, META, GENERATION_CONFIG)


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

    A tokenizer that is not in tokenizer files is written as transformers' files: the one in nanoGPT's `meta.pkl`, or
    the one in the weights file, unless the files beside it describe the same tokenizer.

    Raises `CheckpointError` or `TokenizerError` for files that `bridge.storage.companions` rejects.
    """
    found = companions_of(checkpoint)
    if (made := _tokenizer_without_files(checkpoint, found)) is not None:
        save_tokenizer(made, directory)
    copy_companions(found, checkpoint.config, directory)


def carried_names(checkpoint: Checkpoint) -> set[str]:
    """Return the relative paths of the files that `carry_files` writes, and of their folders with a slash at the end.

    Raises the same errors.
    """
    with TemporaryDirectory() as name:
        directory = Path(name)
        carry_files(checkpoint, directory)
        return {path.relative_to(directory).as_posix() + "/" * path.is_dir() for path in directory.rglob("*")}


def copy_companions(found: Mapping[str, Path], config: GPT2Config, directory: Path) -> None:
    """Copy the companions in `found`: relative path -> source directory. Raises the same errors as `carry_files`."""
    for name, place in found.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(checked_companion(place, name, config.vocab_size))


def companions_of(checkpoint: Checkpoint) -> dict[str, Path]:
    """Return the files beside the weights that belong to the checkpoint: relative path -> the directory that has it.

    These are the files of its tokenizer, its chat templates and its generation settings.
    """
    unused = {*unused_companions(checkpoint)}
    return {name: place for name, place in _beside(checkpoint).items() if name not in unused}


def unused_companions(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the relative paths of the files beside the weights that the checkpoint's tokenizer does not use."""
    found = _beside(checkpoint)
    if checkpoint.own_tokenizer is not None:
        used = {*found} if _files_have_own_tokenizer(checkpoint, found) else set()
    elif _is_in_meta(checkpoint, found):
        used = {META}
    else:
        used = {*found} if _files_have_metas_tokenizer(checkpoint, found) else {*found} - {META}
    return tuple(name for name in found if name not in used and not fits_any_tokenizer(name))


def fits_any_tokenizer(name: str) -> bool:
    """Whether a companion is a chat template or the generation settings, which do not depend on the vocabulary."""
    return name in (CHAT_TEMPLATE, GENERATION_CONFIG) or name.startswith(f"{CHAT_TEMPLATE_FOLDER}/")


def _beside(checkpoint: Checkpoint) -> dict[str, Path]:
    path, settings = checkpoint.path, checkpoint.settings_path
    names = [] if path is None else [*tokenizer_files_in(path), *([META] if has_companion(path, META) else [])]
    found = {name: path for name in names if path is not None}
    if settings is not None and has_companion(settings, GENERATION_CONFIG):
        found[GENERATION_CONFIG] = settings
    return found


def _tokenizer_without_files(checkpoint: Checkpoint, found: Collection[str]) -> Tokenizer | None:
    """Return the tokenizer in the weights file or in `meta.pkl`, or None if tokenizer files have it."""
    if {*found} & {*VOCABULARY_FILES}:
        return None
    if checkpoint.own_tokenizer is not None:
        return checkpoint.tokenizer()
    return None if checkpoint.path is None else from_meta(checkpoint.path, checkpoint.progress)


def _is_in_meta(checkpoint: Checkpoint, found: Collection[str]) -> bool:
    try:
        return _tokenizer_without_files(checkpoint, found) is not None
    except TokenizerError:
        return META in found


def _files_have_metas_tokenizer(checkpoint: Checkpoint, found: Collection[str]) -> bool:
    """Whether `meta.pkl` stands beside files that describe the same tokenizer, as a conversion from nanoGPT writes."""
    if checkpoint.path is None or META not in found:
        return False
    try:
        meta = from_meta(checkpoint.path, {})
        return meta is not None and meta.fingerprint == checkpoint.tokenizer().fingerprint
    except TokenizerError:
        return False


def _files_have_own_tokenizer(checkpoint: Checkpoint, found: Collection[str]) -> bool:
    """Whether the files in `found`, which stand beside the weights, are the tokenizer in the weights file.

    The files may also say which added tokens are normalized. A weights file does not, and GPT-2 has no normalizer.
    """
    if checkpoint.own_tokenizer is None or not {*found} & {*VOCABULARY_FILES}:
        return False
    try:
        own, beside = checkpoint.own_tokenizer(), replace(checkpoint, own_tokenizer=None).tokenizer()
    except TokenizerError:
        return False
    if not (isinstance(own, ByteLevelBPE) and isinstance(beside, ByteLevelBPE) and beside.source == checkpoint.path):
        return False
    return _rules(own) == _rules(beside)


def _rules(tokenizer: ByteLevelBPE) -> tuple[Any, ...]:
    """Return what determines the ids and the end of a text."""
    added = {token.content: token.id for token in tokenizer.added.values()}
    return tokenizer.ranks, added, tokenizer.around, tokenizer.add_prefix_space, tokenizer.eos_token_ids


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

"""`load` recognises a checkpoint and `save` writes one; the formats themselves live in `bridge.formats`."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from bridge.arrays import FLOAT_DTYPES, LazyTensors, TensorEntry
from bridge.checkpoint import Checkpoint
from bridge.errors import BridgeError, CheckpointError, ConversionError, install_command, quoted
from bridge.files import new_directory, new_file
from bridge.finite import count_not_finite
from bridge.formats import FORMATS, WRITABLE
from bridge.formats.directory import CONFIG, carry_files, write_config
from bridge.stored_file import StoredFile
from bridge.tokenizer import TOKENIZER_FILES

_HUB_COMPANIONS = ("config.json", "generation_config.json", *TOKENIZER_FILES)
_HUB_WEIGHTS = (
    ("*.safetensors", "*.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    ("flax_model*.msgpack", "flax_model.msgpack.index.json"),
)
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


BUNDLED = Path(__file__).parent / "bundled"
"""A small GPT-2 that this project trained on Shakespeare, in Hugging Face format; `load("bundled")` opens it."""


def load(source: str | Path) -> Checkpoint:
    """The checkpoint at a path, or on the Hugging Face hub under an id such as `gpt2`, or `bundled`.

    Only names, shapes and the configuration are read; a tensor is read when it is looked up.
    Raises a child of `BridgeError` naming what is wrong with the source and what to do.
    """
    if not str(source):
        raise CheckpointError("the source is empty; give a directory or a Hugging Face id")
    path = Path(source).absolute()  # it is read later, perhaps from another working directory
    if str(source) == BUNDLED.name and not path.exists():
        path = BUNDLED
    if not os.path.exists(path):  # unlike Path.exists, False also for a name too long to exist
        if not _HUB_ID.fullmatch(str(source)):
            raise CheckpointError(f"{quoted(source)} does not exist")
        path = _from_hub(str(source))
    module = _recognized(path)
    if module is None:
        raise CheckpointError(f"{quoted(path)} cannot be read as a checkpoint: {_what_it_lacks(path)}")
    try:
        return module.read(path)
    except BridgeError as error:
        if quoted(path)[1:-1] in str(error):
            raise
        raise type(error)(f"{quoted(path)}: {error}") from error


def save(
    checkpoint: Checkpoint,
    target: str | Path,
    *,
    format: str,
    overwrite: bool = False,
    keep_not_finite: bool = False,
    **options: Any,
) -> tuple[str, ...]:
    """Write `checkpoint` as a new directory, or file; it appears under its name complete, or not at all.

    A format that is one file is written as `target` if that ends as its files do (`.pt`, `.bin`, `.gguf`). Any other
    `target` is a directory: the file in it, with the tokenizer and a `config.json` of what the file does not say.

    Args:
        format: a name in `bridge.formats.WRITABLE`.
        overwrite: replace the checkpoint that is at `target`. Without it an existing target is an
            error; with it, one that is anything else than a checkpoint still is.
        keep_not_finite: write NaN and infinity too; without it they are a `ConversionError` that names the tensor.
        options: the format's own, for example `max_shard_bytes` for "huggingface".

    Returns what was left out because the target has no place for it, a sentence each. That is never anything that
    the function depends on: a format that cannot say it is refused with a child of `BridgeError` naming the field.
    """
    if format not in WRITABLE:
        raise CheckpointError(f"format {quoted(format)} is not one of {', '.join(WRITABLE)}")
    if overwrite and os.path.lexists(target) and not _may_be_replaced(Path(target)):
        raise CheckpointError(f"{quoted(target)} is not a checkpoint; it is not overwritten: choose another name")
    if not keep_not_finite:
        checkpoint = _watched(checkpoint)
    module = FORMATS[format]
    left_out: tuple[str, ...] = ()
    if hasattr(module, "FILE") and Path(target).suffix in module.SUFFIXES:
        with new_file(target, overwrite=overwrite) as file:
            left_out = module.write(checkpoint, file, **options)
    else:
        with new_directory(target, overwrite=overwrite) as directory:
            if hasattr(module, "FILE"):
                module.write(checkpoint, directory / module.FILE, **options)
                write_config(directory / CONFIG, checkpoint.config, checkpoint.extra)
                carry_files(checkpoint, directory)
            else:
                module.write(checkpoint, directory, **options)
    steps = checkpoint.optimizer.step if checkpoint.optimizer is not None else 0
    if steps and not hasattr(module, "KEEPS_OPTIMIZER"):
        left_out += (f"the state of AdamW after {steps} steps, which {format} has no place for",)
    return left_out


def _watched(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint; reading a weight or a moment of AdamW that has NaN or infinity raises."""
    adamw = checkpoint.optimizer
    if adamw is not None:
        adamw = replace(
            adamw,
            first=_watched_tensors(LazyTensors.of(adamw.first), "the first moment of "),
            second=_watched_tensors(LazyTensors.of(adamw.second), "the second moment of "),
        )
    return replace(checkpoint, tensors=_watched_tensors(checkpoint.tensors), optimizer=adamw)


def _watched_tensors(tensors: LazyTensors, what: str = "") -> LazyTensors:
    def watched(name: str, entry: TensorEntry) -> TensorEntry:
        def read() -> np.ndarray:
            array = entry.read()
            if array.dtype in FLOAT_DTYPES and (bad := count_not_finite(array)):
                raise ConversionError(
                    f"{what}{name} has {bad} values that are not finite; the checkpoint is damaged, or its training "
                    "diverged (--keep-not-finite, or keep_not_finite=True, writes them as they are)"
                )
            return array

        return replace(entry, read=read)

    return LazyTensors({name: watched(name, entry) for name, entry in tensors.entries.items()})


def _recognized(path: Path) -> ModuleType | None:
    try:
        return next((module for module in FORMATS.values() if module.sniff(path)), None)
    except OSError as error:
        raise CheckpointError(f"cannot read {quoted(path)}: {error.strerror}") from error


def _may_be_replaced(target: Path) -> bool:
    try:
        module = _recognized(target)  # what cannot be written, a training run, is not thrown away either
        empty = target.is_dir() and not any(target.iterdir())
        return empty or (module is not None and module.NAME in WRITABLE)
    except OSError as error:
        raise CheckpointError(f"cannot read {quoted(target)}: {error.strerror}") from error


def _what_it_lacks(path: Path) -> str:
    if path.is_dir():
        return (
            "it has neither config.json with weights beside it (model.safetensors, pytorch_model.bin, "
            "flax_model.safetensors, flax_model.msgpack), nor hparams.json with TensorFlow's, nor a file of weights in "
            "another format that is read (nanoGPT's .pt, llm.c's .bin, .gguf)"
        )
    if not StoredFile.open(path).size:  # which also says if it is no file of data at all
        return "it is empty"
    return "it begins as no format does that is read; the download may be damaged, or it is something else"


def _from_hub(repo_id: str) -> Path:
    missing = f"{quoted(repo_id)} is not a path here"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{missing}; to load it from the Hugging Face hub, install its extra: {install_command('hub')}"
        ) from None
    try:
        for weights in _HUB_WEIGHTS:  # one kind, not all that are there: each is the whole model
            path = Path(snapshot_download(repo_id, allow_patterns=[*_HUB_COMPANIONS, *weights]))
            if _recognized(path) is not None:
                break
        return path
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's
        raise CheckpointError(
            f"{missing}, and the Hugging Face hub did not give it ({type(error).__name__}); check the name and the "
            "connection, or download it elsewhere and give the directory"
        ) from error

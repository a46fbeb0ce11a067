"""`load` recognises a checkpoint and `save` writes one; the formats themselves live in `bridge.formats`."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from bridge import hub
from bridge.checkpoint import Checkpoint
from bridge.errors import BridgeError, CheckpointError, quoted
from bridge.finite import rejecting_non_finite
from bridge.formats import FORMATS, WRITABLE
from bridge.formats.directory import CONFIG, carried_names, carry_files, write_config
from bridge.formats.recognition import (
    Found,
    SeveralCheckpointsError,
    choose_checkpoint,
    own_config,
    why_unrecognised,
)
from bridge.formats.targets import left_out
from bridge.formats.trainers.run import is_run
from bridge.storage.atomic_writes import Replaceable, new_directory, new_file
from bridge.storage.companions import has_companion
from bridge.storage.manifest import recorded
from bridge.storage.tensors import LazyTensorMap

_SUFFIXES = frozenset(
    {
        ".safetensors",
        ".msgpack",
        ".ckpt",
        ".h5",
        ".zip",
        *(suffix for format in FORMATS.values() for suffix in format.suffixes),
    }
)
"""Suffixes of checkpoint files. A target directory with such a name is an error."""
BUNDLED = Path(__file__).parent / "bundled"
"""A small GPT-2 in Hugging Face format, trained on Shakespeare by this project. `load("bundled")` opens it."""


def load(
    source: str | Path,
    *,
    activation: str | None = None,
    drop_extra_heads: bool = False,
    base: str | Path | None = None,
) -> Checkpoint:
    """Open a checkpoint: a path, a Hugging Face id such as `gpt2`, or `bundled`.

    Only names, shapes and the configuration are read; each tensor is read on access.

    Args:
        source: a file, or a directory with one checkpoint. A directory with several is an error that lists them.
        activation: `gelu` or `gelu_new`, for a nanoGPT file that does not state its activation. Passing it for
            any other file is an error.
        drop_extra_heads: leave out the tensors of heads for other tasks, such as classification, and read the language
            model. A diagnostic names them. By default they are an error.
        base: for a LoRA adapter of PEFT: the model that it changes, as a path or a Hugging Face id. The adapter is
            merged into it, and the other arguments apply to both. Passing it for any other source is an error.

    Raises:
        BridgeError: the source cannot be read. The message names the problem and what to do.
    """
    path = local_path(source)
    chosen = choose_checkpoint(path)
    if chosen is None:
        raise CheckpointError(f"{quoted(path)} cannot be read as a checkpoint: {why_unrecognised(path)}")
    try:
        checkpoint = _read(*chosen, activation, drop_extra_heads, base)
        return replace(checkpoint, source=checkpoint.source or chosen[0].path)
    except BridgeError as error:
        if quoted(path)[1:-1] in str(error):
            raise
        raise type(error)(f"{quoted(path)}: {error}") from error


def local_path(source: str | Path) -> Path:
    """Return the absolute path of a source. A Hugging Face id is downloaded.

    Raises `CheckpointError` if the source does not exist or cannot be downloaded.
    """
    if not str(source):
        raise CheckpointError("the source is empty; give a directory or a Hugging Face id")
    path = Path(source).absolute()  # tensors are read later, perhaps from another working directory
    if str(source) == BUNDLED.name and not path.exists():
        return BUNDLED
    if not os.path.exists(path):  # unlike Path.exists, returns False for a name that is too long
        if not hub.is_repo_id(str(source)):
            raise CheckpointError(f"{quoted(Path(source))} does not exist")
        return hub.download(str(source))
    return path


def _read(
    found: Found,
    notes: tuple[str, ...],
    activation: str | None,
    drop_extra_heads: bool,
    base: str | Path | None,
) -> Checkpoint:
    options: dict[str, Any] = {}
    if found.format.base_name is not None:
        options["base"] = load(_base_of(found, base), activation=activation, drop_extra_heads=drop_extra_heads)
        activation = None  # it is the base's
    elif base is not None:
        raise CheckpointError(
            f"{quoted(found.path)}: base={quoted(base)} was given, but this is a model and not an adapter; leave the "
            "argument (--base) out"
        )
    if found.format.may_have_extra_heads:
        options["drop_extra_heads"] = drop_extra_heads
    if found.format.file_name is not None:
        options["config_json"] = config_json = own_config(found.path)
        if config_json is None and has_companion(found.path.parent, CONFIG):
            notes += (f"{CONFIG} beside the file was not read, because the directory holds several checkpoints",)
    if not found.format.states_activation:
        options["activation"] = activation
    elif activation is not None:
        raise CheckpointError(
            f"{quoted(found.path)}: activation={quoted(activation)} was given, but {found.format.name} files state "
            "their activation; leave the argument out (--source-activation), or change the model with "
            "checkpoint.with_activation() (--activation)"
        )
    checkpoint = found.format.read(found.path, **options)
    return replace(checkpoint, diagnostics=(*checkpoint.diagnostics, *notes))


def _base_of(found: Found, base: str | Path | None) -> str | Path:
    """Return `base`, or raise a `CheckpointError` that names the base of the adapter if none was given."""
    if base is not None:
        return base
    name = found.format.base_name(found.path) if found.format.base_name else None
    made_for, given = (quoted(name), quoted(name)) if name else ("another model", "...")
    raise CheckpointError(
        f"{quoted(found.path)} is an adapter for {made_for} and not a model; give that model too: --base {given}, or "
        f"bridge.load(..., base={given})"
    )


def save(
    checkpoint: Checkpoint,
    target: str | Path,
    *,
    format: str,
    overwrite: bool = False,
    allow_non_finite: bool = False,
    **options: Any,
) -> tuple[str, ...]:
    """Write `checkpoint` as a new directory or file. The write is atomic.

    A single-file format is written to `target` itself if `target` has the format's suffix (`.pt`, `.bin`, `.gguf`).
    Any other `target` becomes a directory with that file, the tokenizer, and a `config.json` for the fields that the
    file cannot store.

    Args:
        checkpoint: the checkpoint to write.
        target: the path to write to.
        format: a name in `bridge.formats.WRITABLE`.
        overwrite: replace the checkpoint at `target`. Only three kinds of file are replaced or removed: those recorded
            in a manifest of this project; the weights and the `config.json` of a recognised checkpoint, if `format`
            has these names too; and files that are written again, such as the tokenizer's. If `target` holds other
            files, nothing is written and the error lists them. Without `overwrite`, an existing target is an error.
        allow_non_finite: write NaN and infinity. By default they raise a `ConversionError` that names the tensor.
        options: options of the format, for example `max_shard_bytes` for "huggingface".

    Returns:
        One sentence for each part of the checkpoint that was dropped because the target format cannot store it. Fields
        that affect the model's output are never dropped; a format that cannot store them raises an error.

    Raises:
        CheckpointError: the target exists and may not be replaced, is or contains the checkpoint's source, has the
            suffix of another format, or cannot be written.
        BridgeError: the format cannot represent the model. The message names the field.
    """
    if format not in FORMATS or (write := FORMATS[format].write) is None:
        raise CheckpointError(f"format {quoted(format)} is not one of {', '.join(WRITABLE)}")
    target = Path(target)
    as_file = _names_a_file(target, format)
    _require_not_source(target, checkpoint)
    if not allow_non_finite:
        checkpoint = _rejecting_non_finite(checkpoint)
    if as_file:
        with new_file(target, overwrite=lambda: overwrite and _require_format(target, format)) as file:
            sentences = left_out(checkpoint, format, as_file=True)
            write(checkpoint, file, **options)
    else:
        replaceable = _replaceable(target, format, checkpoint) if overwrite else None
        with new_directory(target, replaceable=replaceable) as directory:
            sentences = left_out(checkpoint, format, as_file=False)
            file_name = FORMATS[format].file_name
            if file_name is None:
                write(checkpoint, directory, **options)
            else:
                write(checkpoint, directory / file_name, **options)
                write_config(directory / CONFIG, checkpoint.config, checkpoint.extra)
                carry_files(checkpoint, directory)
    return sentences


def _rejecting_non_finite(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint that raises when a weight or AdamW moment with NaN or infinity is read."""
    adamw = checkpoint.optimizer
    if adamw is not None:
        adamw = replace(
            adamw,
            exp_avg=rejecting_non_finite(LazyTensorMap.of(adamw.exp_avg), "exp_avg of "),
            exp_avg_sq=rejecting_non_finite(LazyTensorMap.of(adamw.exp_avg_sq), "exp_avg_sq of "),
        )
    return replace(checkpoint, tensors=rejecting_non_finite(checkpoint.tensors), optimizer=adamw)


def _names_a_file(target: Path, format: str) -> bool:
    """Whether `target` is a file, not a directory. Raises `CheckpointError` for the suffix of another format."""
    suffix = target.suffix.lower()
    written = FORMATS[format].suffixes
    if suffix in written:
        return True
    if suffix in _SUFFIXES:
        instead = f"a file that ends in {written[0]}, or a directory" if written else "a directory"
        raise CheckpointError(
            f"{quoted(target)} ends in {suffix}, but {format} is written as {instead}; choose a name without {suffix}"
        )
    return False


def _require_not_source(target: Path, checkpoint: Checkpoint) -> None:
    """Raise if `target` is or contains the source. Tensors are read from the source during the write."""
    sources = [source for source in (checkpoint.source, checkpoint.base_source) if source is not None]
    places = [place for source in sources for place in (source, *source.resolve().parents)]
    if os.path.exists(target) and any(os.path.samefile(target, place) for place in places):
        raise CheckpointError(
            f"{quoted(target)} is, or contains, the source checkpoint; choose another name for the target"
        )


def _replaceable(target: Path, format: str, checkpoint: Checkpoint) -> Replaceable:
    """Return the function that decides which files at `target` may be replaced or removed.

    It accepts files that a manifest in `target` records, weights and a `config.json` with names that `format` writes,
    and the companions that are written with `checkpoint`. It accepts no file if `target` is not a checkpoint in a
    writable format.

    Raises `CheckpointError` if `target` belongs to a training run or holds several checkpoints.
    """
    if not os.path.isdir(target):
        return lambda name: False
    if any(is_run(path) for path in (target.resolve(), *target.resolve().parents)):
        raise CheckpointError(f"{quoted(target)} is not overwritten, because it belongs to a training run")
    try:
        is_writable = _format_of(target) in WRITABLE
    except SeveralCheckpointsError:
        raise CheckpointError(f"{quoted(target)} is not overwritten, because it holds several checkpoints") from None
    if not is_writable:
        return lambda name: False
    known, weights = recorded(target) | {CONFIG, *carried_names(checkpoint)}, re.compile(FORMATS[format].written_names)
    return lambda name: name in known or weights.fullmatch(name) is not None


def _require_format(target: Path, format: str) -> bool:
    """Return True, or raise `CheckpointError` if `target` is a file but not a checkpoint of this format."""
    if os.path.isfile(target) and _format_of(target) != format:
        raise CheckpointError(
            f"{quoted(target)} is not a {format} checkpoint and was not replaced; choose another name"
        )
    return True


def _format_of(path: Path) -> str | None:
    """Return the format of the checkpoint at `path`, or None if it cannot be read.

    Raises `SeveralCheckpointsError` if `path` holds several.
    """
    try:
        return load(path).format
    except SeveralCheckpointsError:
        raise
    except BridgeError:
        return None

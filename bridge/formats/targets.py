"""What each target format leaves out of a checkpoint, found without converting it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bridge.checkpoint import Checkpoint
from bridge.errors import BridgeError, TokenizerError, quoted
from bridge.formats import FORMATS, WRITABLE
from bridge.formats.directory import companions_of, unused_companions
from bridge.formats.format import Format
from bridge.tokenizers.chat.templates import CHAT_TEMPLATE, read_chat_templates
from bridge.tokenizers.loading import TOKENIZER_FILES

_OF_THE_FILE = frozenset({"transformers_version", "torch_dtype", "dtype", "_name_or_path", "name_or_path"})
"""Fields of `config.json` that describe the file and not the model. Their loss is not reported."""


@dataclass(frozen=True)
class Target:
    """What a format leaves out of a checkpoint, one sentence for each part."""

    error: str | None = None
    """Why the format cannot store the model, or None if it can."""
    directory: tuple[str, ...] = ()
    """What is left out if the target is a directory."""
    file: tuple[str, ...] | None = None
    """What is left out if the target is a single file. None if the format has none, or if `error` is set."""


def targets(checkpoint: Checkpoint) -> dict[str, Target]:
    """Return format -> what it leaves out, for each format that `bridge.save` writes.

    The function reads few tensors and writes none. It does not check whether all weights are finite.
    """
    return {name: _target(checkpoint, FORMATS[name]) for name in WRITABLE}


def left_out(checkpoint: Checkpoint, format: str, *, as_file: bool) -> tuple[str, ...]:
    """Return one sentence for each part of a checkpoint that a format cannot store.

    Args:
        format: a name in `bridge.formats.WRITABLE`.
        as_file: whether the target is a single file. A directory also has the files beside the weights.

    Raises `BridgeError` if the format cannot store the model.
    """
    return _left_out(checkpoint, FORMATS[format], FORMATS[format].left_out(checkpoint), as_file)


def _left_out(checkpoint: Checkpoint, format: Format, sentences: tuple[str, ...], as_file: bool) -> tuple[str, ...]:
    """Complete what `Format.left_out` returned."""
    if as_file:
        sentences += (*_files_left_out(checkpoint, format.keeps_tokenizer), *_fields_left_out(checkpoint))
    elif format.file_name is not None:  # config.json and the other files store what the weights file cannot
        sentences = ()
    unused = unused_companions(checkpoint)
    if _has_template_in_settings(checkpoint):
        unused = tuple(name for name in unused if name != "tokenizer_config.json")
    if unused:
        sentences += (f"{', '.join(unused)}, which the source's tokenizer does not use",)
    steps = checkpoint.optimizer.step if checkpoint.optimizer is not None else 0
    if steps and not format.keeps_optimizer:
        sentences += (f"the state of AdamW after {steps} steps, which {format.name} cannot store",)
    return sentences


def _target(checkpoint: Checkpoint, format: Format) -> Target:
    try:
        sentences = format.left_out(checkpoint)
        directory = _left_out(checkpoint, format, sentences, as_file=False)
        has_file = format.file_name is not None
        return Target(None, directory, _left_out(checkpoint, format, sentences, as_file=True) if has_file else None)
    except BridgeError as error:
        return Target(str(error))


def _files_left_out(checkpoint: Checkpoint, keeps_tokenizer: bool) -> Iterator[str]:
    kept = {*TOKENIZER_FILES} - {CHAT_TEMPLATE} if keeps_tokenizer else set()
    names = [name for name in companions_of(checkpoint) if name not in kept]
    if checkpoint.own_tokenizer is not None and not keeps_tokenizer:
        names.insert(0, "the tokenizer inside the source")
    if keeps_tokenizer and _has_template_in_settings(checkpoint):
        names.append("the chat template in tokenizer_config.json")
    if names:
        yield f"a single file cannot store {', '.join(names)}; write a directory to keep it"


def _has_template_in_settings(checkpoint: Checkpoint) -> bool:
    try:
        templates = {} if checkpoint.path is None else read_chat_templates(checkpoint.path)
    except TokenizerError:
        return False
    return any(template.is_in_settings for template in templates.values())


def _fields_left_out(checkpoint: Checkpoint) -> Iterator[str]:
    if names := [quoted(name)[1:-1] for name in checkpoint.extra if name not in _OF_THE_FILE]:
        yield f"a single file cannot store the fields {', '.join(names)} of config.json; write a directory to keep them"

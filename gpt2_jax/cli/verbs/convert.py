"""`gpt2 convert`: any format to any format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

import bridge
from bridge import Checkpoint
from bridge.tokenizers.chat.templates import CHAT_TEMPLATE_FOLDER
from gpt2_jax.cli.arguments import READING, JsonFile, Reading, Source
from gpt2_jax.console.output import json_writer, reading_bar
from gpt2_jax.console.terminal import console

IN_SHARDS = ("huggingface", "flax_msgpack")


def convert(
    source: Source,
    target: Annotated[Positional[Path], arg(metavar="DST")],
    /,
    *,
    to: Literal["huggingface", "flax", "flax_msgpack", "nanogpt", "llmc", "gguf"],
    reading: Reading = READING,
    max_shard_bytes: Annotated[int | None, arg(metavar="BYTES")] = None,
    zero_biases: bool = False,
    activation: Annotated[str | None, arg(metavar="NAME")] = None,
    vocab_size: Annotated[int | None, arg(metavar="ROWS")] = None,
    allow_non_finite: bool = False,
    overwrite: bool = False,
    json: JsonFile = None,
) -> None:
    """Convert a checkpoint to another format, preserving every tensor bit for bit. The write is atomic.

    Example: gpt2 convert ./my-gpt2 ./my-gpt2-flax --to flax

    Args:
        source: a checkpoint in any format, or a Hugging Face id.
        reading: how SRC is read.
        target: the directory to write; or, for nanogpt, llmc and gguf, a file with the suffix .pt, .bin or .gguf.
        to: the format to write.
        max_shard_bytes: for huggingface and flax_msgpack: the maximum size of a file.
        zero_biases: add zero biases to a model without biases, because Hugging Face's GPT-2 requires them.
        activation: set the activation. This changes the model's output. nanogpt supports only gelu.
        vocab_size: remove padding rows of the vocabulary beyond this size.
        allow_non_finite: also write weights that are NaN or infinite; by default they are an error.
        overwrite: replace the checkpoint at the target, and the report of an earlier command. Files that are not
            written again are listed; if this project did not write them, nothing is written.
        json: also write a report to this file.
    """
    options = {} if max_shard_bytes is None else {"max_shard_bytes": max_shard_bytes}
    if options and to not in IN_SHARDS:
        raise bridge.BridgeError(f"--max-shard-bytes is for --to {' and '.join(IN_SHARDS)}; --to {to} writes one file")
    write_json = json_writer(json, overwrite, (source, reading.base, target))
    opened = reading.load(source)
    checkpoint = _changed(opened, zero_biases, activation, vocab_size)
    before = _files_in(target)
    with reading_bar(checkpoint, f"writing {to}") as watched:
        left_out = bridge.save(
            watched, target, format=to, overwrite=overwrite, allow_non_finite=allow_non_finite, **options
        )
    removed = sorted(before - _files_in(target))
    if opened.optimizer is not None and opened.optimizer.step and checkpoint.optimizer is None:
        left_out += ("the AdamW state, because the parameters changed",)
    total = sum(entry.nbytes for entry in checkpoint.tensors.entries.values())
    count = len(checkpoint.tensors)
    done = {"source": source, "from": checkpoint.format, "target": str(target), "to": to}
    about = {"left_out": list(left_out), "removed": removed, "diagnostics": list(opened.diagnostics)}
    write_json({**done, "tensors": count, "bytes": total, **about})
    out = console()
    out.print(f"{target}: {count} tensors, {total:,} bytes, {checkpoint.format} -> {to}", soft_wrap=True)
    for warning in opened.diagnostics:
        out.print(f"warning: {warning}", soft_wrap=True)
    for what in left_out:
        out.print(f"left out: {what}", soft_wrap=True)
    if removed:
        out.print(f"removed: {', '.join(removed)}", soft_wrap=True)


def _files_in(target: Path) -> set[str]:
    """Return the relative paths of the files in a directory and in its folder of chat templates."""
    found = (path for pattern in ("*", f"{CHAT_TEMPLATE_FOLDER}/*") for path in target.glob(pattern))
    return {path.relative_to(target).as_posix() for path in found if path.is_file()}


def _changed(checkpoint: Checkpoint, zero_biases: bool, activation: str | None, vocab_size: int | None) -> Checkpoint:
    """Apply the requested changes, and no others."""
    if zero_biases:
        checkpoint = checkpoint.with_biases()
    if activation is not None:
        checkpoint = checkpoint.with_activation(activation)
    if vocab_size is not None:
        checkpoint = checkpoint.with_vocab_size(vocab_size)
    return checkpoint

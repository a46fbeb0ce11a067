"""`gpt2 convert`: any format to any format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

import bridge
from gpt2_jax.cli.arguments import JsonFile, Source
from gpt2_jax.cli.output import console, json_writer, reading_bar


def convert(
    source: Source,
    target: Annotated[Positional[Path], arg(metavar="DST")],
    /,
    *,
    to: Literal["huggingface", "flax"],
    max_shard_bytes: Annotated[int | None, arg(metavar="BYTES")] = None,
    zero_biases: bool = False,
    overwrite: bool = False,
    json: JsonFile = None,
) -> None:
    """Write a checkpoint in another format, every tensor bit for bit, as one new directory or not at all.

    Example: gpt2 convert ./my-gpt2 ./my-gpt2-flax --to flax

    Args:
        source: a checkpoint directory or a Hugging Face id.
        target: the directory to make.
        to: the format to write.
        max_shard_bytes: for huggingface: begin a new file before one grows past this (default 5 GB).
        zero_biases: give a model without biases biases of zero, which Hugging Face's GPT-2 cannot do without.
        overwrite: replace what is at the target.
        json: also write what was done to this file.
    """
    options = {} if max_shard_bytes is None else {"max_shard_bytes": max_shard_bytes}
    if options and to != "huggingface":
        raise bridge.BridgeError(f"--max-shard-bytes is for --to huggingface; {to} is one file")
    write_json = json_writer(json)
    checkpoint = bridge.load(source)
    if zero_biases:
        checkpoint = checkpoint.with_biases()
    with reading_bar(checkpoint, f"writing {to}") as watched:
        bridge.save(watched, target, format=to, overwrite=overwrite, **options)
    total = sum(entry.nbytes for entry in checkpoint.tensors.entries.values())
    count = len(checkpoint.tensors)
    done = {"source": source, "from": checkpoint.format, "target": str(target), "to": to}
    write_json({**done, "tensors": count, "bytes": total})
    console().print(f"{target}: {count} tensors, {total:,} bytes, {checkpoint.format} -> {to}")

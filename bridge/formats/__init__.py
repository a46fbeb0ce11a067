"""Checkpoint formats: one module per format, each with a `FORMAT`. CONTRIBUTING.md says how to add one."""

from __future__ import annotations

from collections.abc import Mapping

from bridge.formats import flax_directory, flax_msgpack, gguf, huggingface, openai, peft
from bridge.formats.format import Format
from bridge.formats.trainers import llmc, nanogpt, run

FORMATS: Mapping[str, Format] = {
    format.name: format
    for format in (
        run.FORMAT,
        flax_directory.FORMAT,
        peft.FORMAT,  # before Hugging Face, which reads any other safetensors or torch file as a state_dict
        nanogpt.FORMAT,  # before Hugging Face, which reads any other torch file as a state_dict
        huggingface.FORMAT,
        flax_msgpack.FORMAT,
        openai.FORMAT,
        llmc.FORMAT,
        gguf.FORMAT,
    )
}
"""Name -> format, in the order of recognition: the first format that recognises a file reads it."""

WRITABLE = tuple(name for name, format in FORMATS.items() if format.write is not None)
"""The names that `gpt2 convert --to NAME` accepts."""

"""One file per checkpoint format, all with the same verbs. To add one, write it and add a row (CONTRIBUTING.md).

NAME                                      as in `FORMATS`
sniff(path) -> bool                       is this file or directory a checkpoint of this format? by content; cheap,
                                          reads no weights, and says False rather than raise
read(path) -> Checkpoint                  canonical names and layout, tensors read lazily
write(checkpoint, target, **options)      fill an empty directory, or write a new file; the caller makes it atomic
                                          (left out where a format is only read)

A format that is a directory and is written has WRITES, a pattern of the names of its weights' files: these may be
replaced where the caller allows to overwrite.
A format that is one file also has FILE, the name it gets in a directory, and SUFFIXES, those by which a target is
taken for the file itself; its `write` may return sentences on what the file has no place for. A format that keeps
`Checkpoint.optimizer` and `progress` sets KEEPS_OPTIMIZER.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from bridge.formats import flax_directory, flax_msgpack, gguf, huggingface, llmc, nanogpt, openai, run

FORMATS: Mapping[str, ModuleType] = {
    "run": run,
    "flax": flax_directory,
    "nanogpt": nanogpt,  # before Hugging Face, which takes every other file of torch's for a state_dict
    "huggingface": huggingface,
    "flax_msgpack": flax_msgpack,
    "openai": openai,
    "llmc": llmc,
    "gguf": gguf,
}
"""Name -> the module. The first whose `sniff` says yes is used."""

WRITABLE = tuple(name for name, module in FORMATS.items() if hasattr(module, "write"))
"""The names that `gpt2 convert --to NAME` takes."""

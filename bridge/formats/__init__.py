"""One file per checkpoint format, all with the same verbs. To add one, write it and add a row (CONTRIBUTING.md).

NAME                                      as in `FORMATS`
find(path) -> list[Path]                  the checkpoints of this format at `path`: the file itself, recognised by its
                                          content; the weights (or their index) in a directory; or the directory, where
                                          it is one checkpoint as a whole. Cheap: reads no weights. Raises no error of
                                          ours; what cannot be read is not found.
read(path) -> Checkpoint                  one result of `find`, in canonical names and layout, tensors read lazily
write(checkpoint, target, **options)      fill an empty directory, or write a new file; the caller makes it atomic
                                          (left out where a format is only read)

A format that is one file also has FILE, its name in a directory, and SUFFIXES; a target with one of these is the file
itself. Its `read(path, config_json)` also takes the `config.json` that describes the file, or None. Its `write` may
return sentences on what the file has no place for. A format that writes a directory has WRITES instead, a pattern of
the names of its weights' files: an earlier checkpoint's files of these names may be overwritten.

Optional: KEEPS_OPTIMIZER, where a format keeps `Checkpoint.optimizer` and `progress`. STATES_NO_ACTIVATION, where its
files do not; `read` then takes `activation` too. FAMILY, where all files in one directory are forms of one model.
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
"""Name -> the module, in the order in which they are asked; the first that recognises a file reads it."""

WRITABLE = tuple(name for name, module in FORMATS.items() if hasattr(module, "write"))
"""The names that `gpt2 convert --to NAME` takes."""

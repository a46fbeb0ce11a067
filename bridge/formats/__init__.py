"""One module per checkpoint format, all with the same interface. CONTRIBUTING.md says how to add a format.

NAME                                      the key in `FORMATS`
find(path) -> list[Path]                  the checkpoints of this format at `path`: a file, recognised by its content;
                                          the weights (or their index) in a directory; or the directory itself, if it
                                          is one checkpoint. Reads no weights. Skips unreadable files and raises no
                                          `BridgeError`.
read(path) -> Checkpoint                  read one result of `find`: canonical names and layout, lazy tensors
write(checkpoint, target, **options)      fill an empty directory, or write a new file. The caller makes it atomic.
                                          Missing in read-only formats.

A single-file format also has FILE, the file's name in a directory, and SUFFIXES; a target with one of these suffixes is
written as a file. Its `read(path, config_json)` also takes the `config.json` that describes the file, or None. Its
`write` may return one sentence for each thing that the file cannot store. A format that writes a directory has WRITES
instead, a pattern for the names of its weight files; `overwrite` may replace files with such names.

Optional: KEEPS_OPTIMIZER, if the format stores `Checkpoint.optimizer` and `progress`. STATES_NO_ACTIVATION, if its
files do not state the activation; `read` then also takes `activation`. FAMILY, if all files of this format in one
directory are forms of one model.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from bridge.formats import flax_directory, flax_msgpack, gguf, huggingface, llmc, nanogpt, openai, run

FORMATS: Mapping[str, ModuleType] = {
    "run": run,
    "flax": flax_directory,
    "nanogpt": nanogpt,  # before Hugging Face, which reads any other torch file as a state_dict
    "huggingface": huggingface,
    "flax_msgpack": flax_msgpack,
    "openai": openai,
    "llmc": llmc,
    "gguf": gguf,
}
"""Name -> module, in the order of recognition: the first format that recognises a file reads it."""

WRITABLE = tuple(name for name, module in FORMATS.items() if hasattr(module, "write"))
"""The names that `gpt2 convert --to NAME` accepts."""

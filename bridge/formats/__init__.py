"""One file per checkpoint format, all with the same verbs. To add one, write it and add a row.

sniff(path) -> bool                       is this path a checkpoint of this format? cheap, reads no weights
read(path) -> Checkpoint                  canonical names, tensors read lazily
write(checkpoint, directory, **options)   fill an empty directory; the caller makes it atomic
                                          (left out where a format is only read)
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from bridge.formats import flax_directory, huggingface, run

FORMATS: Mapping[str, ModuleType] = {
    "flax": flax_directory,
    "huggingface": huggingface,
    "run": run,
}
"""Name -> the module. The first whose `sniff` says yes is used."""

WRITABLE = tuple(name for name, module in FORMATS.items() if hasattr(module, "write"))
"""The names that `gpt2 convert --to NAME` takes."""

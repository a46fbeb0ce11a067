"""One file per checkpoint format, all with the same three verbs. To add one, write it and add a row.

sniff(path) -> bool                       is this path a checkpoint of this format? cheap, reads no weights
read(path) -> Checkpoint                  canonical names, tensors read lazily
write(checkpoint, directory, **options)   fill an empty directory; the caller makes it atomic
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from bridge.formats import flax_directory, huggingface

FORMATS: Mapping[str, ModuleType] = {
    "flax": flax_directory,
    "huggingface": huggingface,
}
"""Name as in `gpt2 convert --to NAME` -> the module. The first whose `sniff` says yes is used."""

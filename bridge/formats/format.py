"""The interface of a checkpoint format."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bridge.checkpoint import Checkpoint


@dataclass(frozen=True)
class Format:
    """A checkpoint format. CONTRIBUTING.md says how to add one.

    The checkpoint is either a single file, which has a `file_name`, or a directory with a `config.json`.
    """

    name: str
    """The key in `FORMATS`, and the argument of `gpt2 convert --to`."""
    find: Callable[[Path], list[Path]]
    """`find(path)` returns the checkpoints of this format at `path`: a file, recognised by its content; the weights (or
    their index) in a directory; or the directory itself, if it is one checkpoint. It reads no weights, skips unreadable
    files and raises no `BridgeError`."""
    read: Callable[..., Checkpoint]
    """`read(path)` reads a checkpoint that `find` returned, as lazy tensors with canonical names and layout. For a
    single file, `read(path, config_json=...)` also gets the `config.json` that describes the file, or None. Unless the
    format `states_activation`, it also gets `activation=...`, a name or None. If the format `may_have_extra_heads`, it
    also gets `drop_extra_heads=...`. An adapter also gets `base=...`, the checkpoint that it changes."""
    write: Callable[..., None] | None = None
    """`write(checkpoint, target, **options)` fills an empty directory, or writes a new file. The caller calls
    `left_out` first, and makes the write atomic. None for a read-only format."""
    left_out: Callable[[Checkpoint], tuple[str, ...]] = lambda checkpoint: ()
    """`left_out(checkpoint)` returns one sentence for each thing that `write` leaves out, and raises `BridgeError` if
    the format cannot store the model. It writes nothing."""
    file_name: str | None = None
    """Name of the single file when it is written into a directory."""
    suffixes: tuple[str, ...] = ()
    """Suffixes of the single file. A target with one of them is written as a file, not as a directory."""
    weight_files: str = ""
    """For a format that writes a directory: a pattern for the names of its weight files. `overwrite` may replace files
    with such names."""
    keeps_optimizer: bool = False
    """Whether the format stores `Checkpoint.optimizer` and `Checkpoint.progress`."""
    keeps_tokenizer: bool = False
    """Whether a single file of the format stores the tokenizer."""
    states_activation: bool = True
    """Whether a file of the format determines the activation."""
    may_have_extra_heads: bool = False
    """Whether files of the format may have heads for other tasks, such as classification, beside the language model."""
    base_name: Callable[[Path], str | None] | None = None
    """For an adapter, which changes a base: returns the name of the base in the file, or None. None for a model."""
    family: str | None = None
    """Files of one family in the same directory are alternative forms of one model, not several checkpoints."""

    @property
    def written_names(self) -> str:
        """A pattern for the names of the weight files that `write` creates in a directory."""
        return self.weight_files if self.file_name is None else re.escape(self.file_name)

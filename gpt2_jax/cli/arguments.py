"""Arguments that several verbs share."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

import bridge
from bridge import Checkpoint, SequenceClassifier
from bridge.errors import escaped
from bridge.formats.sequence_classifier import is_classifier
from bridge.io import local_path

BUNDLED = str(bridge.BUNDLED)
"""The default source: the small model that comes with the package. Its path is used, because the user may have a
directory named `bundled`."""

Source = Annotated[Positional[str], arg(metavar="SRC")]
SourceOrBundled = Annotated[Positional[str], arg(metavar="SRC", help_behavior_hint="(default: bundled)")]
JsonFile = Annotated[Path | None, arg(metavar="FILE")]
HtmlFile = Annotated[Path | None, arg(metavar="FILE")]


_ACTIVATION_HELP = (
    "the activation of a nanoGPT file that does not state it; gelu_new for nanoGPT's code before June 14, 2023. "
    "Rejected for every other source. (default: none; such a file is read as gelu)"
)
_BASE_HELP = (
    "for a LoRA adapter of PEFT: the model that it changes, in any format, or its Hugging Face id. The adapter is "
    "merged into it. Rejected for every other source. (default: none)"
)
_HEADS_HELP = (
    "leave out the tensors of heads for other tasks, such as classification, and name them; by default they are an "
    "error, but verify checks a sequence classifier with its head"
)


@dataclass(frozen=True)
class SourceFlags:
    """How SRC is read."""

    source_activation: Annotated[
        str | None, arg(metavar="gelu|gelu_new", help=_ACTIVATION_HELP, help_behavior_hint="")
    ] = None
    base: Annotated[str | None, arg(metavar="SRC", help=_BASE_HELP, help_behavior_hint="")] = None
    drop_extra_heads: Annotated[bool, arg(help=_HEADS_HELP)] = False

    def load(self, source: str) -> Checkpoint:
        """Open the checkpoint. See `bridge.load`."""
        return bridge.load(
            source, activation=self.source_activation, drop_extra_heads=self.drop_extra_heads, base=self.base
        )

    def load_with_classifier(self, source: str) -> Checkpoint | SequenceClassifier:
        """Open the checkpoint, or a sequence classifier with its head if no flag of this class is given."""
        path = local_path(source)
        return bridge.load_classifier(path) if self == READING and is_classifier(path) else self.load(str(path))

    def load_with_warnings(self, source: str) -> Checkpoint:
        """Open the checkpoint. If a flag of this class is given, print the reader's diagnostics on standard error."""
        checkpoint = self.load(source)
        for warning in checkpoint.diagnostics if self != READING else ():
            print(f"warning: {escaped(warning)}", file=sys.stderr)
        return checkpoint


Reading = Annotated[SourceFlags, OmitArgPrefixes]
READING = SourceFlags()
"""The default: no flag is given."""


def given_text(text: str | None, text_file: Path | None) -> str | None:
    """Return the text of `--text` or `--text-file`, or None without both.

    Raises `BridgeError` if both are given, or if the file cannot be read.
    """
    if text is not None and text_file is not None:
        raise bridge.BridgeError("--text and --text-file are mutually exclusive; give one")
    if text_file is None:
        return text
    try:
        return text_file.read_text(encoding="utf-8-sig")  # without a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise bridge.BridgeError(f"cannot read {text_file}: {error}") from error

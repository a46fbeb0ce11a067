"""One family of errors: whatever a checkpoint has wrong with it arrives as a `BridgeError`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath


class BridgeError(ValueError):
    """Something about a checkpoint, its configuration or its tokenizer cannot be used.

    The message names what is wrong, where, and what to do about it.
    """


class ConfigError(BridgeError):
    """A configuration is malformed, or asks for mathematics that is not implemented."""


class CheckpointError(BridgeError):
    """A file or directory is missing, damaged, or not a checkpoint this project reads."""


class ConversionError(BridgeError):
    """The tensors are not the tensors of the model that the configuration describes."""


class TokenizerError(BridgeError):
    """A checkpoint's tokenizer is missing or unusable."""


class NoTokenizerError(TokenizerError):
    """A checkpoint has no tokenizer, or it is one that cannot be got at here; nothing is damaged."""


def quoted(text: object, limit: int = 80) -> str:
    """Untrusted text made fit for a message: quoted, control characters escaped, cut to `limit`.

    A path is not cut: the message has to name the file, and a file's name comes last.
    """
    try:
        shown = str(text)
    except (ValueError, RecursionError):  # thousands of digits, or of lists inside each other
        shown = f"{type(text).__name__} that is too large to show"
    if len(shown) > limit and not isinstance(text, PurePath):
        shown = shown[: limit - 3] + "..."
    return f"'{escaped(shown, keep='')}'"


def escaped(text: str, keep: str = "\n") -> str:
    """Text in which nothing can control a terminal: characters that are not printable are escaped, except `keep`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def install_command(extra: str) -> str:
    """The command that installs an optional dependency of this package, for a message."""
    return f"pip install 'gpt2-bridge[{extra}]'"


def bullet_list(problems: Iterable[str], limit: int = 40) -> str:
    """Many problems in one message, a line each; all are counted, at most `limit` are spelled out."""
    lines = list(problems)
    shown = lines[:limit]
    if len(lines) > limit:
        shown.append(f"... and {len(lines) - limit} more")
    return "\n".join(f"  - {line}" for line in shown)

"""Errors. Every problem with a checkpoint is reported as a `BridgeError`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath


class BridgeError(ValueError):
    """A checkpoint, its configuration or its tokenizer cannot be used.

    The message says what is wrong, where, and what to do.
    """


class ConfigError(BridgeError):
    """A configuration is malformed, or requires a computation that is not implemented."""


class CheckpointError(BridgeError):
    """A file or directory is missing, damaged, or not a checkpoint that this project reads."""


class ConversionError(BridgeError):
    """The tensors do not match the model that the configuration describes."""


class TokenizerError(BridgeError):
    """A checkpoint's tokenizer is missing or unusable."""


class NoTokenizerError(TokenizerError):
    """A checkpoint has no tokenizer, or its tokenizer is not available on this machine. Nothing is damaged."""


def quoted(text: object, limit: int = 80) -> str:
    """Format untrusted text for a message: quote it, escape control characters, truncate it to `limit` characters.

    A path is not truncated, because its last part, the name of the file, must remain.
    """
    try:
        shown = str(text)
    except (ValueError, RecursionError):  # thousands of digits or of nested lists
        shown = f"{type(text).__name__} that is too large to show"
    if len(shown) > limit and not isinstance(text, PurePath):
        shown = shown[: limit - 3] + "..."
    return f"'{escaped(shown, keep='')}'"


def escaped(text: str, keep: str = "\n") -> str:
    """Escape non-printable characters except those in `keep`, so that the text cannot control a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def install_command(extra: str) -> str:
    """Return the command that installs an optional dependency of this package, for a message."""
    return f"pip install 'gpt2-bridge[{extra}]'"


def bullet_list(problems: Iterable[str], limit: int = 40) -> str:
    """Format many problems as lines of one message. At most `limit` are shown; the others are counted."""
    lines = list(problems)
    shown = lines[:limit]
    if len(lines) > limit:
        shown.append(f"... and {len(lines) - limit} more")
    return "\n".join(f"  - {line}" for line in shown)

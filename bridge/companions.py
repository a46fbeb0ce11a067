"""The small files beside a checkpoint's weights, which are input from a stranger as the weights are.

A companion is a regular file that lies in the checkpoint's directory, or in the `blobs` of the Hugging Face cache that
the directory is part of. A link that leads anywhere else is refused, because its content would reach the result and
every export. Shards follow the same rule (`formats/sharded.py`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from bridge.errors import BridgeError, CheckpointError, quoted
from bridge.json_text import parse_plain_object
from bridge.small_file import read_small_file

MOST_SETTINGS_BYTES = 2**20
"""Of a JSON file of settings: an index of GPT-2 XL has 50 kB. Parsed, hostile JSON takes 33 times its size."""
MOST_TOKENS = 300_000
"""Of a tokenizer where no model limits it."""

_VOCABULARIES = {"tokenizer.json": 128, "vocab.json": 96, "encoder.json": 96, "merges.txt": 64, "vocab.bpe": 64}
"""Files whose size follows the vocabulary -> the most bytes for each token.

GPT-2's own `tokenizer.json` takes 110 where it is indented by four and escaped to ASCII.
"""
_OPENAIS_TOKENS = 50257
# Newer versions of huggingface_hub keep the blobs of all repositories in one place, CACHE/blobs/PREFIX/HASH.
_SHARED_BLOB = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")


def has_companion(directory: Path, name: str) -> bool:
    """Whether anything has this name, also what `read_companion` refuses: it must not count as missing."""
    return os.path.lexists(directory / name)


def stays_inside(directory: Path, name: str) -> bool:
    """Whether a file of `directory` lies in it, or in the blobs of its Hugging Face cache."""
    home = Path(os.path.realpath(directory))
    real = Path(os.path.realpath(directory / name))
    if real.parent == home:
        return True
    snapshot = next((path for path in (home, *home.parents) if path.parent.name == "snapshots"), None)
    if snapshot is None:
        return False
    repository = snapshot.parent.parent
    shared = repository.parent / "blobs"
    return real.parent == repository / "blobs" or (
        real.is_relative_to(shared) and bool(_SHARED_BLOB.fullmatch(real.relative_to(shared).as_posix()))
    )


def read_companion(
    directory: Path, name: str, rows: int = MOST_TOKENS, error: type[BridgeError] = CheckpointError
) -> bytes:
    """The bytes of a companion.

    Args:
        rows: size of the model's vocabulary, which limits the files of its tokenizer.
        error: raised for what is missing, too large, no regular file or a link that leads out of `directory`.
    """
    path = directory / name
    if not stays_inside(directory, name):
        raise error(
            f"{quoted(path)} is a link that leads out of the checkpoint's directory; replace it with a copy of the "
            "file if you trust the checkpoint, or delete it"
        )
    if os.path.islink(path) and not os.path.exists(path):
        raise error(f"{quoted(path)} is a link that leads to nothing; replace it with the file, or delete it")
    try:
        return read_small_file(Path(os.path.realpath(path)), most_bytes(name, rows), error, named=path)
    except OSError as problem:
        raise error(f"cannot read {quoted(path)}: {problem.strerror}") from problem


def read_json_companion(
    directory: Path, name: str, rows: int = MOST_TOKENS, error: type[BridgeError] = CheckpointError
) -> dict[str, Any]:
    """The object in a JSON companion; arguments as of `read_companion`."""
    content = read_companion(directory, name, rows, error)
    return parse_plain_object(content, quoted(directory / name), error, _most_elements(name, rows))


def checked_companion(directory: Path, name: str, rows: int) -> bytes:
    """The bytes of a companion that is copied without being used, once they are JSON, or else UTF-8 text.

    Raises `CheckpointError` for anything else.
    """
    content = read_companion(directory, name, rows)
    where = quoted(directory / name)
    if name.endswith(".json"):
        parse_plain_object(content, where, CheckpointError, _most_elements(name, rows))
    else:
        decoded(content, where, CheckpointError)
    return content


def decoded(content: bytes, where: str, error: type[BridgeError]) -> str:
    """UTF-8 text; `error`, with `where` in front, for other bytes."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{where} is not UTF-8: {quoted(problem)}") from None


def most_bytes(name: str, rows: int) -> int:
    """The most bytes that are read of the companion with this name."""
    if name not in _VOCABULARIES:
        return MOST_SETTINGS_BYTES
    # The floor lets a tokenizer that is too large for its model reach the error that says so.
    return max(2**22, 2**20 + _VOCABULARIES[name] * _tokens(rows))


def _most_elements(name: str, rows: int) -> int:
    """A tokenizer.json has at most six separators for each token: two in its vocabulary, four in its merge."""
    return 2**17 + (8 * max(_tokens(rows), _OPENAIS_TOKENS) if name in _VOCABULARIES else 0)


def _tokens(rows: int) -> int:
    return min(rows, MOST_TOKENS)

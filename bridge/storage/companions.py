"""Companions: the small files beside a checkpoint's weights. Like the weights, they are untrusted input.

A companion is a regular file in the checkpoint's directory, in one of its folders, or in the `blobs` of the Hugging
Face cache that contains the directory. A link to any other file is rejected, because an export would copy that file's
content. The same rule applies to shards (`formats/sharded.py`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from bridge.errors import BridgeError, CheckpointError, quoted
from bridge.storage.json_text import parse_plain_object
from bridge.storage.regular_file import read_small_file

MOST_SETTINGS_BYTES = 2**20
"""Limit for a JSON file of settings. GPT-2 XL's index has 50 kB. Malicious JSON takes 33 times its size when parsed."""
MOST_TEMPLATE_BYTES = 2**17
"""Limit for a chat template. The largest public ones have 30 kB."""
MOST_TOKENS = 300_000
"""Limit for a tokenizer file if the size of the vocabulary is not known."""

_VOCABULARIES = {
    "tokenizer.json": 128,
    "vocab.json": 96,
    "encoder.json": 96,
    "merges.txt": 64,
    "vocab.bpe": 64,
    **dict.fromkeys(("vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"), 64),
}
"""Files whose size grows with the vocabulary -> the maximum bytes per token.

GPT-2's own `tokenizer.json` takes 110 bytes per token when it is indented by four and escaped to ASCII.
"""
_OPENAIS_TOKENS = 50257
# Newer versions of huggingface_hub keep the blobs of all repositories in one place, CACHE/blobs/PREFIX/HASH.
_SHARED_BLOB = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")


def has_companion(directory: Path, name: str) -> bool:
    """Whether a path of this name exists. This includes paths that exist but that `read_companion` rejects."""
    return os.path.lexists(directory / name)


def stays_inside(directory: Path, name: str) -> bool:
    """Whether a file of `directory` resolves to a path in it, or in the blobs of its Hugging Face cache."""
    home = Path(os.path.realpath(directory))
    real = Path(os.path.realpath(directory / name))
    if real.parent == (home / name).parent:
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
    """Return the bytes of a companion.

    Args:
        rows: size of the model's vocabulary, which limits the size of its tokenizer files.
        error: raised if the file is missing, too large, not a regular file, or a link out of `directory`.
    """
    path = directory / name
    if not stays_inside(directory, name):
        raise error(
            f"{quoted(path)} is a link out of the checkpoint's directory; replace it with a copy of the "
            "file if you trust the checkpoint, or delete it"
        )
    if os.path.islink(path) and not os.path.exists(path):
        raise error(f"{quoted(path)} is a broken link; replace it with the file, or delete it")
    try:
        return read_small_file(Path(os.path.realpath(path)), most_bytes(name, rows), error, named=path)
    except OSError as problem:
        raise error(f"cannot read {quoted(path)}: {problem.strerror}") from problem


def read_json_companion(
    directory: Path, name: str, rows: int = MOST_TOKENS, error: type[BridgeError] = CheckpointError
) -> dict[str, Any]:
    """Return the object in a JSON companion. The arguments are those of `read_companion`."""
    content = read_companion(directory, name, rows, error)
    return parse_plain_object(content, quoted(directory / name), error, _most_elements(name, rows))


def checked_companion(directory: Path, name: str, rows: int) -> bytes:
    """Return the bytes of a companion that is only copied, after checking that they are JSON or UTF-8 text.

    Raises `CheckpointError` if they are neither. SentencePiece models and `meta.pkl` are not text and not checked.
    """
    content = read_companion(directory, name, rows)
    where = quoted(directory / name)
    if name.endswith((".model", ".pkl")):
        return content
    if name.endswith(".json"):
        parse_plain_object(content, where, CheckpointError, _most_elements(name, rows))
    else:
        decoded(content, where, CheckpointError)
    return content


def decoded(content: bytes, where: str, error: type[BridgeError]) -> str:
    """Decode UTF-8. Raises `error`, with `where` as a prefix, for other bytes."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{where} is not UTF-8: {quoted(problem)}") from None


def most_bytes(name: str, rows: int) -> int:
    """Return the size limit, in bytes, of the companion with this name."""
    if name not in _VOCABULARIES:
        return MOST_TEMPLATE_BYTES if name.endswith(".jinja") else MOST_SETTINGS_BYTES
    # The lower bound ensures that a tokenizer too large for its model gets a more specific error than the size limit.
    return max(2**22, 2**20 + _VOCABULARIES[name] * _tokens(rows))


def _most_elements(name: str, rows: int) -> int:
    """Return the element limit. A tokenizer.json has six separators per token: two in vocab, four in its merge."""
    return 2**17 + (8 * max(_tokens(rows), _OPENAIS_TOKENS) if name in _VOCABULARIES else 0)


def _tokens(rows: int) -> int:
    return min(rows, MOST_TOKENS)

"""Tokenizers small enough to write by hand."""

from __future__ import annotations

import json
from pathlib import Path


def write_byte_tokenizer(directory: Path) -> None:
    """A vocabulary of the 256 bytes, id = byte, as `vocab.json` and an empty `merges.txt`.

    The characters that stand for bytes are GPT-2's (gpt-2/src/encoder.py), restated here rather than
    imported so that the reader is tested against something else than itself.
    """
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    moved = [b for b in range(256) if b not in plain]
    names = {b: chr(b) if b in plain else chr(256 + moved.index(b)) for b in range(256)}
    (directory / "vocab.json").write_text(json.dumps({names[b]: b for b in range(256)}), encoding="utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")

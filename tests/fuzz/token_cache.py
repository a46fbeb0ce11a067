"""A directory of the token cache, with valid or invalid hashes."""

from __future__ import annotations

import hashlib
import json
import random
from contextlib import suppress
from pathlib import Path

import numpy as np
from fuzz import json_damage

from bridge import byte_tokenizer
from gpt2_jax.data.text.documents import find_documents
from gpt2_jax.data.tokens.cache import cached_text, open_cached

HASHES = {"sha256": "tokens.bin", "document_ends_sha256": "document_ends.bin"}


def samples(folder: Path) -> list[Path]:
    (folder / "texts").mkdir()
    for number in range(5):
        (folder / "texts" / str(number)).write_text(f"text number {number}")
    cached_text(find_documents(folder / "texts"), byte_tokenizer(), cache=folder / "cache")
    return [*(folder / "cache").iterdir()]


def mutable(source: Path) -> list[Path]:
    return [source / name for name in ("tokens.json", *HASHES.values())]


def damage(content: bytes, file: Path, rng: random.Random) -> bytes:
    if file.name == "tokens.json":
        return json_damage.damaged_json(content, rng)
    ids = np.frombuffer(content, "<i8" if "ends" in file.name else "<u2").copy()
    ids[rng.randrange(len(ids))] = rng.choice((0, 1, len(ids), 50, 2**15 - 1, -1)) % 2**16
    return ids.tobytes()


def repair(source: Path) -> None:
    """Update the hashes, as an attacker can."""
    with suppress(ValueError, RecursionError, TypeError):
        about = json.loads((source / "tokens.json").read_bytes())
        for field, name in HASHES.items():
            about[field] = hashlib.sha256((source / name).read_bytes()).hexdigest()
        (source / "tokens.json").write_text(json.dumps(about))


def judge(source: Path) -> str:
    text = open_cached(source)
    if text is None:
        return "refused"
    tokens = text.tokens
    ids = np.fromfile(source / "tokens.bin", "<u2")
    np.testing.assert_array_equal(tokens.read(0, len(tokens)), ids)
    assert tokens.content == hashlib.sha256(ids.tobytes()).hexdigest()
    ends = tokens.document_ends
    assert ends is not None and (np.diff(ends) >= 0).all() and ends[0] >= 0 and ends[-1] == len(ids)
    assert type(text.skipped) is int and text.skipped >= 0
    return "loaded"

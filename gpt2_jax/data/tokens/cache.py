"""The token cache: directories with the tokens of a source, which later runs reuse."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bridge.errors import BridgeError, quoted
from bridge.storage.atomic_writes import new_directory
from bridge.storage.json_text import parse_object
from bridge.storage.regular_file import read_small_file
from bridge.tokenizers.byte_level_bpe import END_OF_TEXT
from bridge.tokenizers.tokenizer import SpecialTokenPolicy, Tokenizer
from gpt2_jax.console.cache import cache_directory
from gpt2_jax.data.errors import DataError
from gpt2_jax.data.text.blocks import text_blocks
from gpt2_jax.data.text.documents import Documents
from gpt2_jax.data.text.special_tokens import around_documents
from gpt2_jax.data.tokens.cache_writer import (
    COUNTS,
    ENDS,
    FILES,
    FORMAT,
    TOKENS,
    Encoding,
    Source,
    TaskProgress,
    write_tokens,
)
from gpt2_jax.data.tokens.files import SIDECAR, TokenFile
from gpt2_jax.data.tokens.stream import TokenStream

_MAX_SIDECAR_BYTES = 2**20
_MAX_COUNT = 2**53
"""Limit on integers in JSON. Not every JSON parser reads larger ones exactly."""
_ENDS_PER_BLOCK = 2**20


@dataclass(frozen=True)
class CachedText:
    """The tokens of a source, and what was left out of it."""

    tokens: TokenStream
    skipped: int
    """The number of files that are not text."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """The number of records, by reason."""


def cached_text(
    documents: Documents,
    tokenizer: Tokenizer,
    *,
    special_tokens: SpecialTokenPolicy = "match",
    cache: str | Path | None = None,
    progress: TaskProgress | None = None,
) -> CachedText:
    """Return the tokens of `documents`, encoded into the cache if they are not there yet.

    The key of a cache directory is the tokenizer and the paths, sizes and times of the documents. The directory holds
    the ids without a header (`tokens.bin`, uint16; `tokens.uint32` for a larger vocabulary), `document_ends.bin`
    (int64), `counts_in_loss.bin` (one byte, 0 or 1, per token) if not all tokens count, and `tokens.json`, which
    describes them and has their SHA-256. A damaged directory is rebuilt. Each
    document ends with the tokenizer's end-of-sequence token, if there is one.

    Args:
        special_tokens: what to do where the text contains an added token; see `Tokenizer.encode`.
    """
    key = _encoding_key(tokenizer, special_tokens)
    if_empty = f"none of its {len(documents.files)} files is UTF-8"
    encoding = Encoding(tokenizer, key, lambda: text_blocks(documents, tokenizer, special_tokens), if_empty)
    return cached(documents, encoding, cache, progress)


def cached(
    source: Source, encoding: Encoding, cache: str | Path | None = None, progress: TaskProgress | None = None
) -> CachedText:
    """Return the tokens of a source from its directory of the cache, which is written if it is not there or damaged."""
    directory = cache_directory(cache) / f"tokens-{cache_key(source, encoding.key)}"
    text = open_cached(directory, progress)
    if text is None:
        try:
            with new_directory(directory, replaceable=FILES.__contains__) as temporary:
                write_tokens(temporary, source, encoding, progress)
        except BridgeError:
            # Another process may have written the same directory in the meantime; its content is equal.
            if (text := open_cached(directory)) is None:
                raise
    text = text or open_cached(directory)
    if text is None:
        raise DataError(f"{quoted(directory)} changed while it was opened; try again, or give another cache")
    return text


def _encoding_key(tokenizer: Tokenizer, special_tokens: SpecialTokenPolicy) -> str:
    """Return what distinguishes one encoding of a text from another.

    It is the fingerprint alone, as in version 0.1.0, if added tokens are text and documents end with `<|endoftext|>`.
    """
    before, after = around_documents(tokenizer)
    key = tokenizer.fingerprint
    if special_tokens != "as_text" and tokenizer.added:
        key += f" {special_tokens}"
    usual = tokenizer.added.get(END_OF_TEXT)
    return key if (before, after) == ([], [usual.id] if usual else []) else f"{key} {before} {after}"


def cache_key(source: Source, made_by: str) -> str:
    """Return the cache key of a tokenizer and the current state of these files."""
    files = [(d.name, os.fsdecode(d.path), d.size, d.modified) for d in source.files]
    return hashlib.sha256(json.dumps([FORMAT, made_by, files]).encode()).hexdigest()[:32]


def open_cached(directory: Path, progress: TaskProgress | None = None) -> CachedText | None:
    """Open a directory of the cache. Returns None if it does not exist or is damaged.

    Reads all of its files once to verify their SHA-256. A directory that contains links or special files counts as
    damaged.
    """
    try:
        about = _read_sidecar(directory)
        dtype, ends_path = np.dtype(about["dtype"]), directory / ENDS
        tokens = TokenFile(directory / TOKENS[about["dtype"]], dtype, 0, about["tokens"])
        counts = TokenFile(directory / COUNTS, np.dtype("u1"), 0, tokens.count) if "counts_sha256" in about else None
        sizes = {ends_path: about["documents"] * 8, tokens.path: tokens.count * dtype.itemsize}
        hashes = {ends_path: about["document_ends_sha256"], tokens.path: about["sha256"]}
        if counts is not None:
            sizes[counts.path], hashes[counts.path] = counts.count, about["counts_sha256"]
        for path, size in sizes.items():
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_size != size:
                return None
        for path, expected in hashes.items():
            if _sha256(path, progress if path == tokens.path else None) != expected:
                return None
        if not _are_ends(ends_path, tokens.count):
            return None
        ends = np.memmap(ends_path, "<i8", mode="r").view(np.ndarray)
        content = about["sha256"] + about.get("counts_sha256", "")
        stream = TokenStream.of([tokens], document_ends=ends, content=content)
        if counts is not None:
            stream = replace(stream, counts=TokenStream.of([counts]))
        return CachedText(stream, about["skipped"], about.get("left_out", {}))
    except (OSError, DataError):
        return None


def _read_sidecar(directory: Path) -> dict[str, Any]:
    """Return the description of a directory of the cache. Raises `DataError` if a required field is invalid."""
    path = directory / SIDECAR
    about = parse_object(read_small_file(path, _MAX_SIDECAR_BYTES, DataError), quoted(path), DataError)
    counts = [about.get(name) for name in ("format", "tokens", "documents", "skipped")]
    hashes = [about.get(name) for name in ("sha256", "document_ends_sha256")] + [about.get("counts_sha256", "")]
    left_out = about.get("left_out", {})
    counts += [*left_out.values()] if isinstance(left_out, dict) else [None]
    if (
        not all(type(count) is int and 0 <= count < _MAX_COUNT for count in counts)
        or not all(isinstance(value, str) for value in hashes)
        or about.get("dtype") not in [*TOKENS]
        or about["format"] != FORMAT
        or not about["documents"]
    ):
        raise DataError(f"{quoted(path)} does not describe a directory of tokens")
    return about


def _are_ends(path: Path, count: int) -> bool:
    """Whether document ends never decrease and the last one equals the number of tokens. Reads them in blocks."""
    last = 0
    with path.open("rb") as file:
        while len(ends := np.frombuffer(file.read(8 * _ENDS_PER_BLOCK), "<i8")):
            if ends[0] < last or (np.diff(ends) < 0).any():
                return False
            last = int(ends[-1])
    return last == count


def _sha256(path: Path, progress: TaskProgress | None) -> str:
    digest, done, size = hashlib.sha256(), 0, path.stat().st_size
    buffer = memoryview(bytearray(2**20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            done += count
            if progress:
                progress("verifying tokens", done, size)
    return digest.hexdigest()

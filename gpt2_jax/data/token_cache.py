"""Encode text to token ids on all cores, into a cache directory that later runs reuse."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import Counter, deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bridge.errors import BridgeError, quoted
from bridge.storage.atomic_writes import new_directory
from bridge.storage.json_text import parse_object
from bridge.storage.regular_file import read_small_file
from bridge.tokenizers.byte_level_bpe import END_OF_TEXT
from bridge.tokenizers.tokenizer import SpecialTokenPolicy, Tokenizer
from gpt2_jax.console.cache import cache_directory
from gpt2_jax.data.documents import Documents
from gpt2_jax.data.errors import DataError
from gpt2_jax.data.special_tokens import around_documents, blocks_to_encode
from gpt2_jax.data.token_files import SIDECAR, TokenFile
from gpt2_jax.data.token_stream import TokenStream

TaskProgress = Callable[[str, int, int], None]
"""Called with the name of the task, the number of bytes done and their total."""

_FORMAT = 1
_MAX_SIDECAR_BYTES = 2**20
_MAX_COUNT = 2**53
"""Limit on integers in JSON. Not every JSON parser reads larger ones exactly."""
_ENDS = "document_ends.bin"
_ENDS_PER_BLOCK = 2**20
_TOKENS = {"<u2": "tokens.bin", "<u4": "tokens.uint32"}  # `.bin` alone means uint16, as in nanoGPT
_FILES = {SIDECAR, _ENDS, *_TOKENS.values()}


@dataclass(frozen=True)
class CachedText:
    """The tokens of a text source, and the number of its files that were skipped because they are not text."""

    tokens: TokenStream
    skipped: int


def cached_text(
    documents: Documents,
    tokenizer: Tokenizer,
    *,
    special_tokens: SpecialTokenPolicy = "match",
    cache: str | Path | None = None,
    progress: TaskProgress | None = None,
) -> CachedText:
    """Return the tokens of `documents`, tokenizer them into the cache if they are not there yet.

    The key of a cache directory is the tokenizer and the paths, sizes and times of the documents. The directory holds
    the ids without a header (`tokens.bin`, uint16; `tokens.uint32` for a larger vocabulary), `document_ends.bin`
    (int64), and `tokens.json`, which describes both and has their SHA-256. A damaged directory is rebuilt. Each
    document ends with the tokenizer's end-of-sequence token, if there is one.

    Args:
        special_tokens: what to do where the text contains an added token; see `Tokenizer.encode`.
    """
    directory = cache_directory(cache) / f"tokens-{cache_key(documents, _encoding_key(tokenizer, special_tokens))}"
    text = open_cached(directory, progress)
    if text is None:
        try:
            with new_directory(directory, replaceable=_FILES.__contains__) as temporary:
                _write(temporary, documents, tokenizer, special_tokens, progress)
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


def cache_key(documents: Documents, made_by: str) -> str:
    """Return the cache key of a tokenizer and the current state of these files."""
    files = [(d.name, os.fsdecode(d.path), d.size, d.modified) for d in documents.files]
    return hashlib.sha256(json.dumps([_FORMAT, made_by, files]).encode()).hexdigest()[:32]


def open_cached(directory: Path, progress: TaskProgress | None = None) -> CachedText | None:
    """Open a directory of the cache. Returns None if it does not exist or is damaged.

    Reads all of its files once to verify their SHA-256. A directory that contains links or special files counts as
    damaged.
    """
    try:
        about = _read_sidecar(directory)
        dtype, ends_path = np.dtype(about["dtype"]), directory / _ENDS
        tokens = TokenFile(directory / _TOKENS[about["dtype"]], dtype, 0, about["tokens"])
        for path, size in ((ends_path, about["documents"] * 8), (tokens.path, tokens.count * dtype.itemsize)):
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_size != size:
                return None
        hashes = (_sha256(ends_path, None), _sha256(tokens.path, progress))
        if hashes != (about["document_ends_sha256"], about["sha256"]) or not _are_ends(ends_path, tokens.count):
            return None
        ends = np.memmap(ends_path, "<i8", mode="r").view(np.ndarray)
        stream = TokenStream.of([tokens], document_ends=ends, content=about["sha256"])
        return CachedText(stream, about["skipped"])
    except (OSError, DataError):
        return None


def _read_sidecar(directory: Path) -> dict[str, Any]:
    """Return the description of a directory of the cache. Raises `DataError` if a required field is invalid."""
    path = directory / SIDECAR
    about = parse_object(read_small_file(path, _MAX_SIDECAR_BYTES, DataError), quoted(path), DataError)
    counts = [about.get(name) for name in ("format", "tokens", "documents", "skipped")]
    hashes = [about.get(name) for name in ("sha256", "document_ends_sha256")]
    if (
        not all(type(count) is int and 0 <= count < _MAX_COUNT for count in counts)
        or not all(isinstance(value, str) for value in hashes)
        or about.get("dtype") not in [*_TOKENS]
        or about["format"] != _FORMAT
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


def _write(
    directory: Path,
    documents: Documents,
    tokenizer: Tokenizer,
    special_tokens: SpecialTokenPolicy,
    progress: TaskProgress | None,
) -> None:
    about: dict[str, Any] = {
        "format": _FORMAT,
        "source": documents.source,
        "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
        "dtype": "<u2" if tokenizer.max_token_id < 2**16 else "<u4",
    }
    with (directory / _TOKENS[about["dtype"]]).open("wb") as tokens, (directory / _ENDS).open("wb") as ends:
        blocks = _blocks_encoded(documents, tokenizer, special_tokens, np.dtype(about["dtype"]))
        about |= _encode(documents, blocks, (tokens, ends), progress)
    if not about["characters"]:
        raise DataError(f"{quoted(documents.source)} has no text: none of its {len(documents.files)} files is UTF-8")
    (directory / SIDECAR).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _encode(
    documents: Documents,
    encoded: Generator[_Block | None, None, None],
    outputs: tuple[BinaryIO, BinaryIO],
    progress: TaskProgress | None,
) -> dict[str, Any]:
    """Write the ids of every document to the first file and its end to the second. Returns the counts."""
    tokens, ends = outputs
    count = Counter(tokens=0, documents=0, skipped=len(documents.files), bytes=0, characters=0)
    digest, ends_digest = hashlib.sha256(), hashlib.sha256()
    with closing(encoded) as blocks:
        for block in blocks:
            if block is not None:
                digest.update(block.ids.data)
                tokens.write(block.ids.data)
                count["tokens"] += len(block.ids)
            if block is None:
                end = count["tokens"].to_bytes(8, "little")
                ends.write(end)
                ends_digest.update(end)
                count.update(documents=1, skipped=-1)
            else:
                count.update(bytes=block.bytes, characters=block.characters)
                if progress:
                    progress("tokenising", count["bytes"], documents.size)
    return {**count, "sha256": digest.hexdigest(), "document_ends_sha256": ends_digest.hexdigest()}


@dataclass(frozen=True)
class _Block:
    ids: np.ndarray
    bytes: int
    characters: int


def _blocks_encoded(
    documents: Documents, tokenizer: Tokenizer, special_tokens: SpecialTokenPolicy, dtype: np.dtype
) -> Generator[_Block | None, None, None]:
    """Yield the blocks of all documents in order, with None after each document. Blocks are read lazily.

    The tokens before and after a document are blocks without text.
    """
    before, after = (_Block(np.array(ids, dtype), 0, 0) for ids in around_documents(tokenizer))

    def encoded(text: str) -> _Block:
        # An array, because threads would wait for the interpreter's lock to build a list.
        ids = tokenizer.encode_to_numpy(text, special_tokens=special_tokens, add_special_tokens=False).astype(dtype)
        return _Block(ids, len(text.encode()), len(text))

    workers = os.cpu_count() or 1
    waiting: deque[Future[_Block] | _Block | None] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="tokenise") as pool:
        try:
            for document in documents.readable():
                waiting.append(before)
                for text in blocks_to_encode(document, tokenizer):
                    waiting.append(pool.submit(encoded, text))
                    while len(waiting) > 4 * workers:
                        yield _result(waiting.popleft())
                waiting += [after, None]
            while waiting:
                yield _result(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _result(block: Future[_Block] | _Block | None) -> _Block | None:
    return block.result() if isinstance(block, Future) else block

"""Text to token ids, once: encoded on all cores into a directory that later runs open."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from bridge.bpe import END_OF_TEXT
from bridge.errors import BridgeError, quoted
from bridge.files import new_directory
from bridge.json_text import parse_object
from bridge.tokenizer import tokenizer_fingerprint
from gpt2_jax.data.errors import DataError
from gpt2_jax.data.text import Documents
from gpt2_jax.data.tokens import TokenFile, TokenStream

if TYPE_CHECKING:
    import tiktoken

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many bytes of text are done, and how many there are."""

_FORMAT = 1
_TOKENS, _ENDS, _SIDECAR = "tokens.bin", "document_ends.bin", "tokens.json"


def cached_tokens(
    documents: Documents,
    encoding: tiktoken.Encoding,
    *,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> TokenStream:
    """The tokens of `documents`, from the cache, or encoded into it first.

    A directory of the cache belongs to a tokenizer and to the names, sizes and times of the documents;
    one that is damaged is made anew. It holds `tokens.bin` (uint16 where the vocabulary allows, else
    uint32, no header), `document_ends.bin` (int64), and `tokens.json`, which describes them.
    Where the tokenizer has `<|endoftext|>`, each document ends with it.
    """
    directory = cache_directory(cache) / f"tokens-{_key(documents, encoding)}"
    if (stream := _opened(directory)) is None:
        try:
            with new_directory(directory, overwrite=directory.exists()) as beside:
                _write(beside, documents, encoding, progress)
        except BridgeError:
            # Another process may have made the same directory meanwhile; what it holds is the same.
            if (stream := _opened(directory)) is None:
                raise
    return stream or _opened_or_raise(directory)


def cache_directory(cache: str | Path | None = None) -> Path:
    """`cache`, or gpt2-bridge in the user's cache: $XDG_CACHE_HOME, ~/.cache where that is not set."""
    if cache is not None:
        return Path(cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2-bridge"


def _key(documents: Documents, encoding: tiktoken.Encoding) -> str:
    files = [(d.name, d.size, d.modified) for d in documents.files]
    about = json.dumps([_FORMAT, tokenizer_fingerprint(encoding), files])
    return hashlib.sha256(about.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _opened(directory: Path) -> TokenStream | None:
    """The stream of a cache directory; None where there is none, or what is there is damaged."""
    try:
        about = parse_object((directory / _SIDECAR).read_bytes(), quoted(directory / _SIDECAR), DataError)
        dtype, count, documents = np.dtype(about["dtype"]), int(about["tokens"]), int(about["documents"])
        sizes = ((directory / _TOKENS).stat().st_size, (directory / _ENDS).stat().st_size)
        if about["format"] != _FORMAT or sizes != (count * dtype.itemsize, documents * 8) or not count:
            return None
        ends = np.memmap(directory / _ENDS, "<i8", mode="r")
        if ends[-1] != count:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    tokens = TokenFile(directory / _TOKENS, dtype, 0, count)
    return TokenStream.of([tokens], all_document_ends=ends, content=about["sha256"])


def _opened_or_raise(directory: Path) -> TokenStream:
    if (stream := _opened(directory)) is None:
        raise DataError(f"{quoted(directory)} has changed while it was opened; try again, or give another cache")
    return stream


def _write(directory: Path, documents: Documents, encoding: tiktoken.Encoding, progress: Progress | None) -> None:
    about: dict[str, Any] = {
        "format": _FORMAT,
        "source": documents.source,
        "tokenizer": {"name": encoding.name, "fingerprint": tokenizer_fingerprint(encoding)},
        "dtype": ("<u2" if encoding.max_token_value < 2**16 else "<u4"),
    }
    with (directory / _TOKENS).open("wb") as tokens, (directory / _ENDS).open("wb") as ends:
        about |= _encode(documents, encoding, np.dtype(about["dtype"]), (tokens, ends), progress)
    if not about["tokens"]:
        raise DataError(f"{quoted(documents.source)} has no text: none of its {len(documents.files)} files is UTF-8")
    (directory / _SIDECAR).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _encode(
    documents: Documents,
    encoding: tiktoken.Encoding,
    dtype: np.dtype,
    into: tuple[BinaryIO, BinaryIO],
    progress: Progress | None,
) -> dict[str, Any]:
    """Write every document's ids to the first file and its end to the second; return what was counted."""
    tokens, ends = into
    has_end = END_OF_TEXT in encoding.special_tokens_set
    end_of_text = np.array([encoding.encode_single_token(END_OF_TEXT)] if has_end else [], dtype)
    count = Counter(tokens=0, documents=0, skipped=len(documents.files), bytes=0, characters=0)
    seen = hashlib.sha256()
    with closing(_blocks_encoded(documents, encoding, dtype)) as blocks:
        for block in blocks:
            ids = end_of_text if block is None else block.ids
            seen.update(ids.data)
            tokens.write(ids.data)
            count["tokens"] += len(ids)
            if block is None:
                ends.write(count["tokens"].to_bytes(8, "little"))
                count.update(documents=1, skipped=-1)
            else:
                count.update(bytes=block.bytes, characters=block.characters)
                if progress:
                    progress("tokenising", count["bytes"], documents.size)
    return {**count, "sha256": seen.hexdigest()}


@dataclass(frozen=True)
class _Block:
    ids: np.ndarray
    bytes: int
    characters: int


def _blocks_encoded(documents: Documents, encoding: tiktoken.Encoding, dtype: np.dtype) -> Generator[_Block | None]:
    """The blocks of all documents in order, with None where a document ends; read as they are taken."""

    def encoded(text: str) -> _Block:
        return _Block(np.array(encoding.encode_ordinary(text), dtype), len(text.encode()), len(text))

    workers = os.cpu_count() or 1
    waiting: deque[Future[_Block] | None] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="tokenise") as pool:
        try:
            for document in documents.readable():
                for text in document.blocks():
                    waiting.append(pool.submit(encoded, text))
                    while len(waiting) > 4 * workers:
                        yield _result(waiting.popleft())
                waiting.append(None)
            while waiting:
                yield _result(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _result(future: Future[_Block] | None) -> _Block | None:
    return future.result() if future else None

"""The tokenizer that `--tokenizer` names: an existing one, or one that is made from the text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import bridge
from bridge.errors import BridgeError, quoted
from bridge.storage import manifest
from bridge.storage.atomic_writes import new_directory
from bridge.tokenizers.loading import (
    NO_LIMIT,
    TOKENIZER_FILES,
    byte_tokenizer,
    character_tokenizer,
    load_tokenizer,
    openai_tokenizer,
)
from bridge.tokenizers.saving import save_tokenizer
from bridge.tokenizers.tokenizer import Tokenizer
from gpt2_jax.console.cache import cache_directory
from gpt2_jax.data.errors import DataError
from gpt2_jax.data.text.bpe_training import train_bpe
from gpt2_jax.data.text.documents import Document
from gpt2_jax.data.tokens.cache import cache_key
from gpt2_jax.data.tokens.cache_writer import Source, TaskProgress

MADE_FROM_TEXT = ("characters", "bpe")


class TextSource(Source, Protocol):
    """The text that a tokenizer is trained on: `Documents`, `gpt2_jax.data.records.files.Records`, or a `Corpus` of
    them."""

    @property
    def key(self) -> str: ...
    def texts(self) -> Iterator[tuple[str, int]]: ...


@dataclass(frozen=True)
class Corpus:
    """Several sources of text as one."""

    source: str
    parts: tuple[TextSource, ...]

    @property
    def files(self) -> tuple[Document, ...]:
        return tuple(file for part in self.parts for file in part.files)

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def key(self) -> str:
        return "".join(part.key for part in self.parts)

    def texts(self) -> Iterator[tuple[str, int]]:
        before = 0
        for part in self.parts:
            yield from ((text, before + read) for text, read in part.texts())
            before += part.size


def make_tokenizer(
    spec: str,
    documents: TextSource | None = None,
    vocab_size: int | None = None,
    *,
    cache: str | Path | None = None,
    progress: TaskProgress | None = None,
) -> Tokenizer:
    """Return the tokenizer that `spec` names.

    Args:
        spec: `gpt2`; `bytes`; `characters`, one id per character of the documents; `bpe`, trained on the documents;
            or the directory of a tokenizer or a checkpoint.
        documents: the text that `characters` and `bpe` are made from. Their tokenizers are stored in the cache.
        vocab_size: the vocabulary size that `bpe` is trained to.
        cache: the cache directory; default `cache_directory()`.

    Raises:
        DataError: `spec` needs documents or a vocabulary size that is not given, or names no tokenizer.
        TokenizerError: the tokenizer cannot be used.
    """
    if spec == "gpt2":
        return openai_tokenizer()
    if spec == "bytes":
        return byte_tokenizer()
    if spec not in MADE_FROM_TEXT:
        return _load(Path(spec))
    if documents is None:
        raise DataError(
            f"the tokenizer {quoted(spec)} is made from text, but the data is token files; give the tokenizer that "
            "made them (gpt2, bytes, or a directory), or none"
        )
    if spec == "bpe" and vocab_size is None:
        raise DataError("a BPE tokenizer is trained to a size; give vocab_size")
    made_by = (f"bpe {vocab_size}" if spec == "bpe" else spec) + documents.key
    directory = cache_directory(cache) / f"tokenizer-{cache_key(documents, made_by)}"
    tokenizer = _load_cached(directory)
    if tokenizer is None:
        tokenizer = _make_from_text(documents, vocab_size if spec == "bpe" else None, progress)
        _store(tokenizer, directory)
    tokenizer.name = spec
    tokenizer.source = None  # the cache may be deleted while a run uses the tokenizer
    return tokenizer


def _make_from_text(documents: TextSource, vocab_size: int | None, progress: TaskProgress | None) -> Tokenizer:
    if vocab_size is not None:
        return train_bpe(_texts(documents, progress, "training BPE"), vocab_size)
    characters: set[str] = set()
    for text in _texts(documents, progress, "reading characters"):
        characters.update(text)
    return character_tokenizer(characters)


def _texts(documents: TextSource, progress: TaskProgress | None, doing: str) -> Iterator[str]:
    for text, read in documents.texts():
        yield text
        if progress:
            progress(doing, read, documents.size)


def _load(path: Path) -> Tokenizer:
    if not path.is_dir():
        raise DataError(
            f"the tokenizer {quoted(str(path))} must be gpt2, bytes, characters, bpe, or a directory that has one"
        )
    if (path / "config.json").exists():
        return bridge.load(path).tokenizer()
    tokenizer = load_tokenizer(path, NO_LIMIT)
    tokenizer.chat_directory = path
    return tokenizer


def _load_cached(directory: Path) -> Tokenizer | None:
    try:
        manifest.verify(directory)
        return load_tokenizer(directory, NO_LIMIT)
    except BridgeError:  # it does not exist, or is damaged
        return None


def _store(tokenizer: Tokenizer, directory: Path) -> None:
    try:
        with new_directory(directory, replaceable={*TOKENIZER_FILES, manifest.MANIFEST}.__contains__) as temporary:
            save_tokenizer(tokenizer, temporary)
            manifest.commit(temporary, {"tokenizer": tokenizer.name})
    except BridgeError:
        # Another process may have stored the same tokenizer in the meantime.
        if _load_cached(directory) is None:
            raise

"""What `--tokenizer` names: a tokenizer that exists, or one that is made from the text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

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
from gpt2_jax.console.cache import cache_directory
from gpt2_jax.data.bpe import train_bpe
from gpt2_jax.data.errors import DataError
from gpt2_jax.data.text import Documents
from gpt2_jax.data.tokenize import TaskProgress, cache_key

if TYPE_CHECKING:
    import tiktoken

MADE_FROM_TEXT = ("characters", "bpe")


def make_tokenizer(
    spec: str,
    documents: Documents | None = None,
    vocab_size: int | None = None,
    *,
    cache: str | Path | None = None,
    progress: TaskProgress | None = None,
) -> tiktoken.Encoding:
    """The tokenizer that `spec` names.

    Args:
        spec: `gpt2`; `bytes`; `characters`, those of the documents; `bpe`, trained on the documents to
            `vocab_size`; or a directory with a tokenizer, a checkpoint's or its own. What is made from
            the documents is kept in the cache.

    Raises `DataError` where there is no text to make it from, `TokenizerError` where it is unusable.
    """
    if spec == "gpt2":
        return openai_tokenizer()
    if spec == "bytes":
        return byte_tokenizer()
    if spec not in MADE_FROM_TEXT:
        return _saved(Path(spec))
    if documents is None:
        raise DataError(
            f"the tokenizer {quoted(spec)} is made from text, and the data is tokens already; name the one that made "
            "them (gpt2, bytes, or a directory), or none"
        )
    if spec == "bpe" and vocab_size is None:
        raise DataError("a BPE tokenizer is trained to a size; give vocab_size")
    made_by = f"bpe {vocab_size}" if spec == "bpe" else spec
    directory = cache_directory(cache) / f"tokenizer-{cache_key(documents, made_by)}"
    encoding = _kept(directory)
    if encoding is None:
        encoding = _made(documents, vocab_size if spec == "bpe" else None, progress)
        _keep(encoding, directory)
    encoding.name = spec
    return encoding


def _made(documents: Documents, vocab_size: int | None, progress: TaskProgress | None) -> tiktoken.Encoding:
    if vocab_size is not None:
        return train_bpe(_texts(documents, progress, "training BPE"), vocab_size)
    characters: set[str] = set()
    for text in _texts(documents, progress, "reading characters"):
        characters.update(text)
    return character_tokenizer(characters)


def _texts(documents: Documents, progress: TaskProgress | None, doing: str) -> Iterator[str]:
    done = 0
    for document in documents.readable():
        yield from document.blocks()
        done += document.size
        if progress:
            progress(doing, done, documents.size)


def _saved(path: Path) -> tiktoken.Encoding:
    if not path.is_dir():
        raise DataError(
            f"the tokenizer {quoted(str(path))} is none of gpt2, bytes, characters, bpe, and no directory that has one"
        )
    return bridge.load(path).tokenizer() if (path / "config.json").exists() else load_tokenizer(path, NO_LIMIT)


def _kept(directory: Path) -> tiktoken.Encoding | None:
    try:
        manifest.verify(directory)
        return load_tokenizer(directory, NO_LIMIT)
    except BridgeError:  # it does not exist, or is damaged
        return None


def _keep(encoding: tiktoken.Encoding, directory: Path) -> None:
    try:
        with new_directory(directory, replaceable={*TOKENIZER_FILES, manifest.MANIFEST}.__contains__) as beside:
            save_tokenizer(encoding, beside)
            manifest.seal(beside, {"tokenizer": encoding.name})
    except BridgeError:
        # Another process may have made the same one meanwhile.
        if _kept(directory) is None:
            raise

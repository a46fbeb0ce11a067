"""What `--data` and `--tokenizer` name, opened."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import bridge
from bridge.errors import quoted
from bridge.tokenizer import (
    byte_tokenizer,
    character_tokenizer,
    load_tokenizer,
    openai_tokenizer,
    tokenizer_fingerprint,
)
from gpt2_jax.data.errors import DataError
from gpt2_jax.data.text import Documents, find_documents
from gpt2_jax.data.tokenize import Progress, cached_tokens
from gpt2_jax.data.tokens import TokenStream, is_token_source, open_tokens

if TYPE_CHECKING:
    import tiktoken

MADE_FROM_TEXT = ("characters", "bpe")
"""Tokenizers that have to see the text first."""


@dataclass(frozen=True)
class Data:
    """What a run trains on."""

    train: TokenStream
    validation: TokenStream | None
    """None where validation_fraction is 0."""
    tokenizer: tiktoken.Encoding | None
    """None for token files of which it was not said who made them."""
    description: str
    """A line for people."""

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides which batches a run sees, besides its configuration."""
        parts = [self.train.fingerprint, self.validation.fingerprint if self.validation else ""]
        parts.append(tokenizer_fingerprint(self.tokenizer) if self.tokenizer else "")
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def open_data(
    source: str | Path,
    *,
    tokenizer: tiktoken.Encoding | str | None = None,
    vocab_size: int | None = None,
    validation: str | Path | None = None,
    validation_fraction: float = 0.1,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Data:
    """Open a text or token source; text is encoded into the cache on first use.

    Args:
        source: a text file, a directory or a glob of text files, `stdlib`; or token files: nanoGPT's
            `.bin`, llm.c's shards, `.npy`, one, a glob, or a directory of them.
        tokenizer: one, or what `make_tokenizer` takes; token files need none.
        vocab_size: the model's: BPE is trained to it, and larger ids in token files are an error.
        validation: another source for validation. Without it the validation stream is that of token
            files which are named train and val, else the last `validation_fraction` of the tokens:
            whole documents where there are several, and for one text file nanoGPT's split.
        cache: a directory for encoded text; default `cache_directory()`.

    Raises `DataError` where a source is missing, damaged or empty.
    """
    if not 0 <= validation_fraction < 1:
        raise DataError(f"validation_fraction={validation_fraction}: must be at least 0 and below 1")
    sources = [source] if validation is None else [source, validation]
    texts = [None if is_token_source(s) else find_documents(s) for s in sources]
    encoding = _tokenizer(tokenizer, source, [t for t in texts if t is not None], vocab_size)
    if vocab_size is None and encoding is not None:
        vocab_size = encoding.max_token_value + 1

    def opened(source: str | Path, text: Documents | None) -> tuple[TokenStream, TokenStream | None]:
        if text is None:
            return open_tokens(source, vocab_size)
        assert encoding is not None
        return cached_tokens(text, encoding, cache=cache, progress=progress), None

    train, held_out = opened(source, texts[0])
    if validation is not None:
        held_out = opened(validation, texts[1])[0]
    elif held_out is None and validation_fraction:
        train, held_out = split(train, validation_fraction)
    return Data(train, held_out, encoding, _description(source, train, held_out, encoding))


def make_tokenizer(spec: str, documents: Documents | None = None, vocab_size: int | None = None) -> tiktoken.Encoding:
    """`gpt2`, `bytes`, `characters` (those of the documents), `bpe` (trained on them to `vocab_size`), or a
    directory that has a tokenizer, a checkpoint or not.
    """
    if spec in MADE_FROM_TEXT and documents is None:
        raise DataError(
            f"the tokenizer {quoted(spec)} is made from text, and the data is tokens already; name the one that made "
            "them (gpt2, bytes, or a directory), or none"
        )
    if spec == "gpt2":
        return openai_tokenizer()
    if spec == "bytes":
        return byte_tokenizer()
    if spec == "characters":
        assert documents is not None
        return character_tokenizer(set().union(*(text for d in documents.readable() for text in d.blocks())))
    if spec == "bpe":
        return _trained_bpe(documents, vocab_size)
    path = Path(spec)
    if not path.is_dir():
        raise DataError(
            f"the tokenizer {quoted(spec)} is none of gpt2, bytes, characters, bpe, and no directory here that has one"
        )
    return bridge.load(path).tokenizer() if (path / "config.json").exists() else load_tokenizer(path, 2**31)


def split(stream: TokenStream, fraction: float) -> tuple[TokenStream, TokenStream]:
    """The stream without its last `fraction`, and that: between two documents if one ends near there."""
    at = int(len(stream) * (1 - fraction))
    ends = stream.document_ends
    if ends is not None and len(ends) > 1:
        near = int(np.searchsorted(ends, at))
        nearest = min(ends[max(0, near - 1) : near + 1].tolist(), key=lambda end: abs(end - at))
        if abs(nearest - at) <= (len(stream) - at) / 2:
            at = nearest
    if not 0 < at < len(stream):
        raise DataError(f"{len(stream)} tokens cannot be parted for training and validation; give more data")
    return stream.part(0, at), stream.part(at, len(stream))


def _tokenizer(
    wanted: tiktoken.Encoding | str | None, source: str | Path, texts: list[Documents], vocab_size: int | None
) -> tiktoken.Encoding | None:
    if wanted is None and texts:
        raise DataError(
            f"{quoted(source)} is text; say by which tokenizer: gpt2, bytes, characters, bpe, or a directory"
        )
    if not isinstance(wanted, str):
        return wanted
    # A character that only the validation text has needs an id too.
    files = [file for text in (texts if wanted == "characters" else texts[:1]) for file in text.files]
    return make_tokenizer(wanted, Documents(str(source), tuple(files)) if texts else None, vocab_size)


def _trained_bpe(documents: Documents | None, vocab_size: int | None) -> tiktoken.Encoding:
    from gpt2_jax.data.bpe import train_bpe

    if vocab_size is None:
        raise DataError("a BPE tokenizer is trained to a size; give vocab_size")
    assert documents is not None
    return train_bpe((text for d in documents.readable() for text in d.blocks()), vocab_size)


def _description(
    source: str | Path, train: TokenStream, validation: TokenStream | None, encoding: tiktoken.Encoding | None
) -> str:
    ends = train.document_ends
    documents = "" if ends is None else f" in {len(ends)} document{'s' * (len(ends) > 1)}"
    held_out = f", {len(validation)} for validation" if validation else ""
    tokens = f"tokens of {encoding.name}" if encoding else "tokens"
    return f"{source}: {len(train)} {tokens}{documents}{held_out}"

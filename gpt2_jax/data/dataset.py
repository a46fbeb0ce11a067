"""The training and validation data of a run, opened from the source that `--data` names."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import numpy as np

from bridge.errors import quoted
from bridge.tokenizers.tokenizer import SpecialTokenPolicy, Tokenizer
from gpt2_jax.data.errors import DataError
from gpt2_jax.data.file_kinds import is_mixture_file
from gpt2_jax.data.mixture import Mixture
from gpt2_jax.data.mixture_file import MixtureSource, read_mixture
from gpt2_jax.data.records.encoding import cached_records
from gpt2_jax.data.records.files import Records, RecordSource, find_records
from gpt2_jax.data.records.schema import RecordOptions
from gpt2_jax.data.text.documents import STDLIB, Documents, find_documents
from gpt2_jax.data.text.tokenizers import Corpus, make_tokenizer
from gpt2_jax.data.tokens.cache import CachedText, cached_text, open_cached
from gpt2_jax.data.tokens.cache_writer import TaskProgress, described
from gpt2_jax.data.tokens.stream import TokenStream, is_token_cache, is_token_source, open_tokens

if TYPE_CHECKING:
    from gpt2_jax.data.batches import Examples  # imports grain, which this module does not need


@dataclass(frozen=True)
class Data:
    """The data of a run."""

    train: TokenStream | Mixture
    validation: TokenStream | None
    """None if validation_fraction is 0. For a mixture, the validation data of its first source."""
    tokenizer: Tokenizer | None
    """None for token files without a given tokenizer."""
    description: str
    """One line to print."""
    validation_sets: Mapping[str, TokenStream] = field(default_factory=dict)
    """The validation sets by name, in order; empty if there are no names. The first one is `validation`."""

    @property
    def usual_examples(self) -> Examples:
        """`stream` if all tokens count in the loss, and `documents` (one example per record) if not."""
        return "stream" if not self.train.is_masked else "documents"

    @property
    def fingerprint(self) -> str:
        """A hash of the training and validation tokens, and of the names of the validation sets in order."""
        parts = [self.train.fingerprint, self.validation.fingerprint if self.validation else "none"]
        parts += [f"{name}={stream.fingerprint}" for name, stream in self.validation_sets.items()]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def open_data(
    source: str | Path,
    *,
    tokenizer: Tokenizer | str | None = None,
    special_tokens: SpecialTokenPolicy = "match",
    vocab_size: int | None = None,
    validation: str | Path | Mapping[str, str] | None = None,
    validation_fraction: float = 0.1,
    records: RecordOptions = RecordOptions(),  # noqa: B008 - frozen
    cache: str | Path | None = None,
    progress: TaskProgress | None = None,
) -> Data:
    """Open a source of text, records or tokens; text and records are encoded into the cache on first use.

    Args:
        source: a text file, a directory or glob of text files, or `stdlib`; or records (JSON lines, JSON, CSV, TSV,
            Parquet, Arrow): one file, a glob, a directory of them, or a directory that `datasets` saved; or token
            files (nanoGPT's `.bin`, llm.c's shards, `.npy`): one file, a glob, a directory of them, or a directory of
            the token cache. Text and records may be compressed (`.gz`, `.xz`, `.zst`). A single `.toml` file is a
            mixture of such sources (`gpt2_jax.data.mixture_file`); each has a validation set of its own.
        tokenizer: a tokenizer, or an argument for `make_tokenizer`. Token files need none.
        special_tokens: what to do where text contains an added token, such as `<|endoftext|>`; see `Tokenizer.encode`.
            nanoGPT's data has `as_text`.
        vocab_size: the vocabulary size that BPE is trained to. Reading an id that the tokenizer does not have is an
            error; without a tokenizer, so is an id of vocab_size or more.
        validation: another source for validation. The default is the token files with val in their names, if there are
            others too, and the split for validation of records; otherwise, the last `validation_fraction` of the
            tokens. That split is at a document boundary if one is near, and always between records with a completion;
            a single text file is split as in nanoGPT. For several sets, a mapping from name to source.
        records: how records are read.
        cache: a directory for encoded text; default `cache_directory()`.

    Raises `DataError` if a source is missing, damaged or empty.
    """
    if not 0 <= validation_fraction < 1:
        raise DataError(f"validation_fraction={validation_fraction}: must be at least 0 and below 1")
    sets = validation if isinstance(validation, Mapping) else {} if validation is None else {"": validation}
    mixed = read_mixture(source, records) if is_mixture_file(source) else ()
    parts = mixed or (MixtureSource("", str(source), 1.0, records),)
    training = [_locate(part.path, part.records) for part in parts]
    found = [*training, *(_locate(path, records) for path in sets.values())]
    if records.is_given and not any(isinstance(f, RecordSource) for f in found):
        raise DataError(
            f"{quoted(source)} does not hold records, so names of fields (--text-field, --prompt-field, "
            "--completion-field, --messages-field) and --skip-bad-records have no effect; leave them out"
        )
    chosen = _tokenizer(tokenizer, training, found, source, vocab_size, cache, progress)
    limit = vocab_size if chosen is None else chosen.vocab_size

    def encoded(part: Documents | Records) -> CachedText:
        assert chosen is not None  # text and records have a tokenizer
        if isinstance(part, Records):
            return cached_records(part, chosen, special_tokens=special_tokens, cache=cache, progress=progress)
        return cached_text(part, chosen, special_tokens=special_tokens, cache=cache, progress=progress)

    opened = [_open(f, encoded, limit, progress) for f in found]

    streams = {name: o.validation or o.train for name, o in zip(sets, opened[len(parts) :], strict=True)}
    trains = []
    for part, one in zip(parts, opened, strict=False):
        train, held_out = one.train, one.validation
        if not sets:
            if held_out is None and validation_fraction:
                train, held_out = split(train, validation_fraction)
            if held_out is not None:
                streams[part.name] = held_out
        trains.append(train)
    whole = Mixture.of(trains, [part.weight for part in mixed]) if mixed else trains[0]
    first = next(iter(streams.values()), None)
    skipped, left_out = sum(o.skipped for o in opened), sum((Counter(o.left_out) for o in opened), Counter[str]())
    description = _description(str(source), whole, first, chosen)
    shares = [f"{part.name} {part.weight / sum(p.weight for p in mixed):.1%}" for part in mixed]
    named = {name: stream for name, stream in streams.items() if name}
    return Data(whole, first, chosen, ", ".join([description, *shares, *_exclusions(skipped, left_out)]), named)


def split(stream: TokenStream, fraction: float) -> tuple[TokenStream, TokenStream]:
    """Split off the last `fraction` of the stream, at a document boundary if one is near.

    A stream in which some tokens do not count is always split at a boundary.
    """
    at = int(len(stream) * (1 - fraction))
    ends = stream.document_ends
    if ends is not None and len(ends) > 1:
        near = int(np.searchsorted(ends, at))
        if stream.counts is not None:
            near = min(near, len(ends) - 2)  # the last end leaves nothing for validation
        nearest = min(ends[max(0, near - 1) : near + 1].tolist(), key=lambda end: abs(end - at))
        if stream.counts is not None or abs(nearest - at) <= (len(stream) - at) / 2:
            at = nearest
    elif stream.counts is not None:
        raise DataError("one record cannot be split for training and validation; give more, or --validation-data")
    if not 0 < at < len(stream):
        raise DataError(f"{len(stream)} tokens cannot be split for training and validation; give more data")
    return stream.part(0, at), stream.part(at, len(stream))


@dataclass(frozen=True)
class _Opened:
    train: TokenStream
    validation: TokenStream | None = None
    skipped: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)


def _locate(source: str | Path, options: RecordOptions) -> Documents | RecordSource | Path:
    """Return the documents of a text source, the records, or the path or glob of token files."""
    if is_token_source(source):
        return Path(source).absolute()
    if str(source) not in (STDLIB, "") and (records := find_records(source, options)) is not None:
        return records
    return find_documents(source)


def _open(
    found: Documents | RecordSource | Path,
    encoded: Callable[[Documents | Records], CachedText],
    vocab_size: int | None,
    progress: TaskProgress | None,
) -> _Opened:
    if isinstance(found, Documents):
        return _of_text(encoded(found), vocab_size)
    if isinstance(found, RecordSource):
        train = _of_text(encoded(found.train), vocab_size)
        if found.validation is None:
            return train
        held_out = _of_text(encoded(found.validation), vocab_size)
        return replace(train, validation=held_out.train, left_out=Counter(train.left_out) + Counter(held_out.left_out))
    if not is_token_cache(found):
        return _Opened(*open_tokens(found, vocab_size))
    if (text := open_cached(found, progress)) is None:
        raise DataError(
            f"{quoted(found)} is damaged or was written by an earlier version; remove it, and give the text instead"
        )
    return _of_text(text, vocab_size)


def _of_text(text: CachedText, vocab_size: int | None) -> _Opened:
    return _Opened(text.tokens.of_vocabulary(vocab_size), skipped=text.skipped, left_out=text.left_out)


def _tokenizer(
    wanted: Tokenizer | str | None,
    training: list[Documents | RecordSource | Path],
    found: list[Documents | RecordSource | Path],
    source: str | Path,
    vocab_size: int | None,
    cache: str | Path | None,
    progress: TaskProgress | None,
) -> Tokenizer | None:
    def texts_of(sources: list[Documents | RecordSource | Path]) -> list[Documents | Records]:
        return [s.train if isinstance(s, RecordSource) else s for s in sources if not isinstance(s, Path)]

    if wanted is None and texts_of(found):
        raise DataError(f"{quoted(source)} is text; give a tokenizer: gpt2, bytes, characters, bpe, or a directory")
    if not isinstance(wanted, str):
        return wanted
    # Characters that occur only in the validation text need ids too.
    parts = texts_of(training)
    if wanted == "characters":
        parts = texts_of(found)
        parts += [s.validation for s in training if isinstance(s, RecordSource) and s.validation is not None]
    corpus = Corpus(str(source), tuple(parts)) if texts_of(training) else None
    return make_tokenizer(wanted, corpus, vocab_size, cache=cache, progress=progress)


def _description(
    source: str, train: TokenStream | Mixture, validation: TokenStream | None, tokenizer: Tokenizer | None
) -> str:
    parts = [f"{_escaped(source)}: {len(train):,} tokens"]
    if tokenizer is not None:
        parts[0] += f" ({_escaped(tokenizer.name)})"
    if isinstance(train, TokenStream) and train.document_ends is not None:
        parts[0] += f" in {len(train.document_ends):,} document{'s' * (len(train.document_ends) > 1)}"
    if validation is not None:
        parts[0] += " for training"
        parts.append(f"{len(validation):,} for validation")
    return ", ".join(parts)


def _exclusions(skipped: int, left_out: Mapping[str, int]) -> Iterator[str]:
    if skipped:
        files = "1 file was" if skipped == 1 else f"{skipped:,} files were"
        yield f"{files} skipped: not UTF-8 text"
    if left_out:
        yield described(left_out)


def _escaped(name: str) -> str:
    """Return the name of a file, escaped for a terminal."""
    return quoted(PurePath(name))[1:-1]

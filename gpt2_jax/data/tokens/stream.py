"""Token ids in files, read by position as if they were one array.

Files are read, not memory-mapped. A permanent map counts every touched page as the process's memory, up to the size of
the data. A map per batch still costs 2 MiB per window on file systems with large folios. And a page fault blocks the
Python interpreter.
"""

from __future__ import annotations

import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
from jaxtyping import Int

from bridge import IGNORE_INDEX
from bridge.errors import quoted
from gpt2_jax.data.errors import DataError
from gpt2_jax.data.file_kinds import is_dataset_id
from gpt2_jax.data.text.documents import STDLIB, matching_files
from gpt2_jax.data.tokens.files import SIDECAR, TokenFile, has_magic, is_token_file, token_file

_SPLIT = re.compile(r"(?:^|[_.-])(train|val|valid|validation)(?=[_.-])", re.IGNORECASE)

FINGERPRINT_BLOCKS = 256
FINGERPRINT_TOKENS = 1024


@dataclass(frozen=True)
class TokenStream:
    """The concatenated token ids of one or several files, or a slice of them."""

    files: tuple[TokenFile, ...]
    start: int
    stop: int
    vocab_size: int | None = None
    """The vocabulary size. Reading an id outside the vocabulary is an error."""
    all_document_ends: Int[np.ndarray, " N"] | None = field(default=None, compare=False)
    """For the concatenated files: the position one past each document's last token."""
    content: str | None = None
    """The hash of all tokens, if known."""
    counts: TokenStream | None = None
    """For each token, 1 if it counts in the loss and 0 if not; None if all tokens count."""

    @classmethod
    def of(
        cls,
        files: Sequence[TokenFile],
        *,
        vocab_size: int | None = None,
        document_ends: Int[np.ndarray, " N"] | None = None,
        content: str | None = None,
    ) -> TokenStream:
        """Return all tokens of `files`, in order."""
        return cls(tuple(files), 0, sum(file.count for file in files), vocab_size, document_ends, content)

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def is_masked(self) -> bool:
        """Whether some tokens do not count in the loss."""
        return self.counts is not None

    def part(self, start: int, stop: int) -> TokenStream:
        """Return tokens start ... stop - 1 as a stream."""
        counts = None if self.counts is None else self.counts.part(start, stop)
        return replace(self, start=self.start + start, stop=self.start + stop, counts=counts)

    def of_vocabulary(self, size: int | None) -> TokenStream:
        """Return a stream that checks ids against a vocabulary of `size` when they are read."""
        return replace(self, vocab_size=size)

    def read(self, start: int, stop: int) -> Int[np.ndarray, " T"]:
        """Return ids start ... stop - 1 as int32. Raises `DataError` for ids outside the vocabulary."""
        return self.read_spans([(start, stop)])[0]

    def read_spans(self, spans: Iterable[tuple[int, int]]) -> list[Int[np.ndarray, " T"]]:
        """Apply `read` to each (start, stop), with parallel reads from the disk."""
        pieces = [list(self._pieces(start, stop)) for start, stop in spans]
        wanted: dict[int, list[tuple[int, int]]] = {}
        for index, start, stop in chain.from_iterable(pieces):
            wanted.setdefault(index, []).append((start, stop))
        for index, file_spans in wanted.items():
            self.files[index].fetch(file_spans)
        read = {index: iter(self.files[index].read(file_spans)) for index, file_spans in wanted.items()}
        return [
            self._joined([self._checked(next(read[index]), index, start) for index, start, _ in span])
            for span in pieces
        ]

    def read_targets(self, spans: Sequence[tuple[int, int]], ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return `ids`, read from these spans, with `IGNORE_INDEX` in place of the tokens that do not count."""
        if self.counts is None:
            return list(ids)
        counts = self.counts.read_spans(spans)
        return [np.where(count, one, np.int32(IGNORE_INDEX)) for count, one in zip(counts, ids, strict=True)]

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield the parts of a span: the index of each file, and start and stop in it."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a stream of {len(self)}")
        position, stop = self.start + start, self.start + stop
        index = bisect_right(self._ends, position)
        while position < stop:
            begin = self._ends[index] - self.files[index].count
            end = min(stop, self._ends[index])
            yield index, position - begin, end - begin
            position = end
            index += 1

    @staticmethod
    def _joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
        one = pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, np.int32), *pieces])
        return one.astype(np.int32)

    @cached_property
    def document_ends(self) -> Int[np.ndarray, " N"] | None:
        """The positions one past the last token of each document, including the last one; None if unknown."""
        if self.all_document_ends is None:
            return None
        first = np.searchsorted(self.all_document_ends, self.start, side="right")
        last = np.searchsorted(self.all_document_ends, self.stop, side="left")
        ends = self.all_document_ends[first : last + 1]
        return ends if self.start == 0 and ends[-1] == self.stop else np.minimum(ends, self.stop) - self.start

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash that identifies the stream: of all tokens if known, otherwise of a sample.

        The sample consists of the lengths of all files and `FINGERPRINT_BLOCKS` evenly spaced blocks of
        `FINGERPRINT_TOKENS` ids. It excludes the names of the files, so that they may be moved.
        """
        content = self.content or self._sample_hash()
        return hashlib.sha256(f"{content} {self.start} {self.stop}".encode()).hexdigest()

    def _sample_hash(self) -> str:
        whole = replace(self, start=0, stop=self._ends[-1])
        digest = hashlib.sha256(np.array([file.count for file in self.files], "<i8").tobytes())
        starts = np.linspace(0, max(0, len(whole) - FINGERPRINT_TOKENS), FINGERPRINT_BLOCKS).astype(int).tolist()
        for ids in whole.read_spans((start, min(len(whole), start + FINGERPRINT_TOKENS)) for start in starts):
            digest.update(ids.astype("<i4").data)
        return digest.hexdigest()

    @cached_property
    def _ends(self) -> list[int]:
        """The end of each file in the concatenation."""
        return list(accumulate(file.count for file in self.files))

    @cached_property
    def _limit(self) -> int:
        return 2**31 if self.vocab_size is None else self.vocab_size

    def _checked(self, ids: np.ndarray, index: int, position: int) -> np.ndarray:
        smallest, largest = self.files[index].id_range
        if (largest >= self._limit and ids.max() >= self._limit) or (smallest < 0 and ids.min() < 0):
            at = int(np.flatnonzero((ids >= self._limit) | (ids < 0))[0])
            raise DataError(
                f"{quoted(self.files[index].path)} has the id {ids[at]} at token {position + at}, and the vocabulary "
                f"has {self._limit}; train with the --tokenizer that made the file, or with its "
                "--vocab-size"
            )
        return ids


def is_token_cache(path: Path) -> bool:
    """Whether a directory belongs to the token cache, damaged or not."""
    return os.path.lexists(path / SIDECAR)


def is_token_source(source: str | Path) -> bool:
    """Whether a path or a glob names token files. Everything else is text.

    A file is recognised by its first bytes (llm.c, NumPy) or by the suffix `.bin` (nanoGPT's files have no header). A
    directory holds tokens if it belongs to the token cache, or if a file in it has such first bytes or is named
    `train.bin`. A glob names token files if all matching files are token files.
    """
    if str(source) in (STDLIB, "") or is_dataset_id(source):
        return False
    path = Path(source)
    if is_token_cache(path):
        return True
    if path.is_dir():
        return any(has_magic(p) or p.name == "train.bin" for p in path.iterdir() if p.is_file())
    if path.is_file():
        return is_token_file(path)
    return all(is_token_file(p) for p in matching_files(source))


def has_validation_files(source: str | Path) -> bool:
    """Whether token files are split into training and validation by their names."""
    return not is_token_cache(Path(source)) and bool(_split_by_name(source)[1])


def open_tokens(source: str | Path, vocab_size: int | None = None) -> tuple[TokenStream, TokenStream | None]:
    """Return the training and validation streams of a file, a directory or a glob of token files.

    Files with val in their names (`val.bin`, `fineweb_val_000000.bin`) are the validation stream. The training stream
    is the files with train in their names, or else the files with neither. If all files are of one kind,
    they form one stream and the second is None. Files are sorted by name.

    Raises `DataError` for a file that is damaged or not a token file.
    """
    training, held_out = _split_by_name(source)
    if not training:
        raise DataError(f"{quoted(source)} has no token files; names that begin with a dot are ignored")

    def stream(paths: list[Path]) -> TokenStream:
        return TokenStream.of([token_file(path) for path in paths], vocab_size=vocab_size)

    return stream(training), stream(held_out) if held_out else None


def _split_by_name(source: str | Path) -> tuple[list[Path], list[Path]]:
    """Return the files of the training and of the validation stream; the second list may be empty."""
    path = Path(source)
    if path.is_dir():
        paths = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith(".") and is_token_file(p))
    else:
        paths = [path] if path.is_file() else matching_files(source)
    splits = [_SPLIT.findall(p.name.lower())[-1:] for p in paths]
    named, others = ([p for p, s in zip(paths, splits, strict=True) if s == split] for split in (["train"], []))
    training = named or others
    held_out = [p for p, split in zip(paths, splits, strict=True) if split and split != ["train"]]
    return (training, held_out) if training and held_out else (paths, [])

"""Token ids in files, read by position as if they were one array.

A file is mapped for the few pages of each read and no longer: a map that stays counts every page it
ever touched as the process's memory, and that would grow to the size of the data.
"""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int

from bridge.errors import quoted
from gpt2_jax.data.errors import DataError
from gpt2_jax.data.text import matching_files

# llm.c, dev/data/data_common.py: 256 int32 of header, of which the first three are the magic number,
# the version and the number of tokens.
_LLMC_HEADER = 256 * 4
_LLMC: dict[int, tuple[int, np.dtype]] = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
_LLMC_EXAMPLES = 20240522  # HellaSwag and MMLU, which are questions and no running text
_NPY = b"\x93NUMPY"
_NPY_DTYPES = ("<u2", "<i4", "<u4", "<i8")

_SPLIT = re.compile(r"(?:^|[_.-])(train|val|valid|validation)(?=[_.-])", re.IGNORECASE)

FINGERPRINT_BLOCKS = 256
FINGERPRINT_TOKENS = 1024


@dataclass(frozen=True)
class TokenFile:
    """Where a file keeps its token ids: `count` of `dtype`, `offset` bytes from its beginning."""

    path: Path
    dtype: np.dtype
    offset: int
    count: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids start ... stop - 1, in the dtype of the file."""
        first = self.offset + start * self.dtype.itemsize
        page = first - first % mmap.ALLOCATIONGRANULARITY
        last = self.offset + stop * self.dtype.itemsize
        try:
            with (
                self.path.open("rb", buffering=0) as file,
                mmap.mmap(file.fileno(), last - page, offset=page, access=mmap.ACCESS_READ) as pages,
            ):
                return np.frombuffer(pages[first - page :], self.dtype)
        except (OSError, ValueError) as error:  # ValueError: it has become shorter than it was
            raise DataError(f"cannot read {quoted(self.path)}, tokens {start} to {stop}: {error}") from error


@dataclass(frozen=True)
class TokenStream:
    """Token ids of one or many files in a row, or a part of such a row."""

    files: tuple[TokenFile, ...]
    start: int
    stop: int
    vocab_size: int | None = None
    """Larger ids are refused where they are read."""
    all_document_ends: Int[np.ndarray, " N"] | None = field(default=None, compare=False)
    """Of the whole row, from its beginning: one past each document's last token."""
    content: str | None = None
    """The hash of all tokens, where it is known."""

    @classmethod
    def of(cls, files: Sequence[TokenFile], **about: object) -> TokenStream:
        return cls(tuple(files), 0, sum(file.count for file in files), **about)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> TokenStream:
        """Tokens start ... stop - 1 of this stream as a stream."""
        return replace(self, start=self.start + start, stop=self.start + stop)

    def read(self, start: int, stop: int) -> Int[np.ndarray, " T"]:
        """Ids start ... stop - 1 as int32. `DataError` for ids that the vocabulary does not have."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a stream of {len(self)}")
        position, stop = self.start + start, self.start + stop
        ids = np.empty(stop - position, np.int32)
        filled = 0
        index = int(np.searchsorted(self._ends, position, side="right"))
        while filled < len(ids):
            file = self.files[index]
            within = position + filled - (int(self._ends[index]) - file.count)
            piece = file.read(within, min(file.count, within + len(ids) - filled))
            self._check(piece, file, within)
            ids[filled : filled + len(piece)] = piece
            filled += len(piece)
            index += 1
        return ids

    @cached_property
    def document_ends(self) -> Int[np.ndarray, " N"] | None:
        """One past the last token of each document, the last one's end included; None where unknown."""
        if self.all_document_ends is None:
            return None
        first = np.searchsorted(self.all_document_ends, self.start, side="right")
        last = np.searchsorted(self.all_document_ends, self.stop, side="left")
        ends = self.all_document_ends[first : last + 1]
        return ends if self.start == 0 and ends[-1] == self.stop else np.minimum(ends, self.stop) - self.start

    @cached_property
    def fingerprint(self) -> str:
        """A hash that tells streams apart: of all tokens where that is known, else of a sample.

        The sample is the lengths of all files and `FINGERPRINT_BLOCKS` blocks of `FINGERPRINT_TOKENS`
        ids, evenly spaced; not the files' names, so that they may move.
        """
        content = self.content or self._sampled()
        return hashlib.sha256(f"{content} {self.start} {self.stop}".encode()).hexdigest()

    def _sampled(self) -> str:
        whole = replace(self, start=0, stop=int(self._ends[-1]))
        seen = hashlib.sha256(np.array([file.count for file in self.files], "<i8").tobytes())
        for start in np.linspace(0, max(0, len(whole) - FINGERPRINT_TOKENS), FINGERPRINT_BLOCKS).astype(int).tolist():
            seen.update(whole.read(start, min(len(whole), start + FINGERPRINT_TOKENS)).astype("<i4").tobytes())
        return seen.hexdigest()

    @cached_property
    def _ends(self) -> Int[np.ndarray, " F"]:
        return np.cumsum([file.count for file in self.files], dtype=np.int64)

    def _check(self, ids: np.ndarray, file: TokenFile, position: int) -> None:
        limit = 2**31 if self.vocab_size is None else self.vocab_size
        if limit > np.iinfo(ids.dtype).max and np.iinfo(ids.dtype).min == 0:
            return
        if len(ids) and (ids.max() >= limit or ids.min() < 0):
            at = int(np.flatnonzero((ids >= limit) | (ids < 0))[0])
            raise DataError(
                f"{quoted(file.path)} has the id {ids[at]} at token {position + at}, and the vocabulary has {limit}; "
                "train with the vocabulary of the tokenizer that made the file"
            )


def is_token_source(source: str | Path) -> bool:
    """Whether a path or a glob names token files; everything else is text.

    A file is one by its first bytes (llm.c's, NumPy's) or by its name (`.bin`: nanoGPT's has no header).
    A directory is one if a file in it has such a beginning or is called `train.bin`; a glob, if all
    that it matches are.
    """
    path = Path(source)
    if path.is_dir():
        return any(_magic(p) or p.name == "train.bin" for p in path.iterdir() if p.is_file())
    if path.is_file():
        return _is_token_file(path)
    return str(source) != "stdlib" and all(_is_token_file(p) for p in matching_files(source))


def open_tokens(source: str | Path, vocab_size: int | None = None) -> tuple[TokenStream, TokenStream | None]:
    """Training and validation streams of a file, a directory or a glob of token files.

    Files whose names say val (`val.bin`, `fineweb_val_000000.bin`) are the validation stream if others
    say train; where they do not, all files are one stream and the second is None. Files follow each
    other by name. Raises `DataError` for a file that is damaged, or not tokens.
    """
    path = Path(source)
    if path.is_dir():
        paths = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith(".") and _is_token_file(p))
    else:
        paths = [path] if path.is_file() else matching_files(source)
    splits = [_SPLIT.findall(p.name.lower())[-1:] for p in paths]
    training = [p for p, split in zip(paths, splits, strict=True) if split == ["train"]]
    held_out = [p for p, split in zip(paths, splits, strict=True) if split and split != ["train"]]
    if not training or not held_out:
        return TokenStream.of([token_file(p) for p in paths], vocab_size=vocab_size), None
    both = ([token_file(p) for p in names] for names in (training, held_out))
    train, validation = (TokenStream.of(files, vocab_size=vocab_size) for files in both)
    return train, validation


def token_file(path: Path) -> TokenFile:
    """What `path` holds, by its beginning. Raises `DataError` where that is not tokens, or not whole."""
    try:
        size = path.stat().st_size
        file = _npy(path) if _beginning(path).startswith(_NPY) else _llmc(path, size) or _nanogpt(path, size)
    except OSError as error:
        raise DataError(f"cannot read {quoted(path)}: {error.strerror}") from error
    if file.count == 0:
        raise DataError(f"{quoted(path)} has no tokens; it was perhaps not written to the end")
    return file


def _llmc(path: Path, size: int) -> TokenFile | None:
    header = np.frombuffer(_beginning(path), "<i4")
    if len(header) < 3 or int(header[0]) not in (*_LLMC, _LLMC_EXAMPLES):
        return None
    magic, version, count = map(int, header[:3])
    if magic == _LLMC_EXAMPLES:
        raise DataError(f"{quoted(path)} holds multiple-choice questions of llm.c, not text; give its token shards")
    expected, dtype = _LLMC[magic]
    if version != expected:
        raise DataError(f"{quoted(path)} is version {version} of llm.c's shards, and {expected} is read; write it anew")
    if size != _LLMC_HEADER + count * dtype.itemsize:
        raise DataError(
            f"{quoted(path)} should hold {count} tokens in {_LLMC_HEADER + count * dtype.itemsize} bytes and has "
            f"{size}; copy or write it again"
        )
    return TokenFile(path, dtype, _LLMC_HEADER, count)


def _nanogpt(path: Path, size: int) -> TokenFile:
    if path.suffix != ".bin":
        raise DataError(f"{quoted(path)} is none of llm.c's shards, .npy, or nanoGPT's .bin")
    if size % 2:
        raise DataError(
            f"{quoted(path)} has {size} bytes, an odd number, and no header: not the uint16 tokens of nanoGPT; "
            "it is cut off, or something else"
        )
    return TokenFile(path, np.dtype("<u2"), 0, size // 2)


def _npy(path: Path) -> TokenFile:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{quoted(path)} cannot be read as .npy: {error}; copy or write it again") from error
    if array.ndim != 1 or array.dtype.newbyteorder("<").str not in _NPY_DTYPES or array.dtype.byteorder == ">":
        raise DataError(
            f"{quoted(path)} holds {array.dtype} of shape {array.shape}; token ids are one-dimensional uint16, "
            "int32, uint32 or int64"
        )
    return TokenFile(path, array.dtype, array.offset, len(array))


def _is_token_file(path: Path) -> bool:
    return path.suffix == ".bin" or _magic(path)


def _magic(path: Path) -> bool:
    beginning = _beginning(path)
    known = [number.to_bytes(4, "little") for number in (*_LLMC, _LLMC_EXAMPLES)]
    return beginning.startswith(_NPY) or beginning[:4] in known


def _beginning(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(12)
    except OSError as error:
        raise DataError(f"cannot read {quoted(path)}: {error.strerror}") from error

"""The documents of a text source, and their text in blocks that can be tokenised separately."""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bridge.errors import quoted
from bridge.formats.trainers.run import RUN
from gpt2_jax.data.compression import open_stream
from gpt2_jax.data.errors import DataError
from gpt2_jax.data.file_kinds import is_mixture_file, record_format

STDLIB = "stdlib"
"""The name of the source that every machine has: the running interpreter's standard library."""

BLOCK_BYTES = 2**18
"""Text is read and encoded in blocks of about this size, which is enough work for one task of a thread pool."""

MAX_BLOCK_BYTES = 16 * BLOCK_BYTES
"""Text of this size without a safe place to split is split anywhere. No natural language has words of this length."""

_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})

# GPT-2's pattern puts white space at the start of a word or in a separate piece, never at the end of a word. A word
# therefore ends wherever white space follows another character. Only space and newline are used, because Python's \S
# and Rust's differ in other characters.
_CUT = re.compile(r"(?<=\S)(?=[ \n])")


@dataclass(frozen=True)
class Document:
    """One file, of text or of records. `name` is its path inside the source, with slashes on every system."""

    name: str
    path: Path
    size: int
    """Bytes."""
    modified: int
    """Nanoseconds since 1970."""

    def is_text(self) -> bool:
        """Whether the file is UTF-8 without NUL bytes, which do not occur in text."""
        try:
            return all("\0" not in text for text in self._decoded())
        except UnicodeDecodeError:
            return False

    def blocks(self) -> Iterator[str]:
        """Yield the text in blocks of about `BLOCK_BYTES`. Encoding them separately gives the tokens of the whole text.

        Raises `DataError` if the file is not UTF-8. Line endings are not changed. A byte-order mark at the start of the
        file, which some editors write, is skipped.
        """
        kept = ""
        try:
            for text in self._decoded():
                kept += text
                cut = _last_cut(kept)
                if cut:
                    yield kept[:cut]
                    kept = kept[cut:]
        except UnicodeDecodeError as error:
            raise DataError(f"{quoted(self.path)} is not UTF-8 text ({error.reason}); convert it to UTF-8") from None
        if kept:
            yield kept

    def _decoded(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()  # skips a byte-order mark at the start
        with open_stream(self.path) as file:
            while block := file.read(BLOCK_BYTES):
                yield decoder.decode(block)
        decoder.decode(b"", final=True)


@dataclass(frozen=True)
class Documents:
    """The documents of one source, in the order in which they are trained on."""

    source: str
    files: tuple[Document, ...]
    key = ""
    """Part of the key of caches made from these texts; see `gpt2_jax.data.records.files.Records`."""

    @property
    def size(self) -> int:
        """Bytes of all documents."""
        return sum(document.size for document in self.files)

    def texts(self) -> Iterator[tuple[str, int]]:
        """Yield the text in blocks, each with the number of bytes of the files that were read so far."""
        read = 0
        for document in self.readable():
            read += document.size
            for text in document.blocks():
                yield text, read

    def readable(self) -> Iterator[Document]:
        """Return the documents that are text. Other files in a directory are skipped; a single file must be text."""
        yield from self.files if len(self.files) == 1 else (d for d in self.files if d.is_text())


def find_documents(source: str | Path) -> Documents:
    """Return the documents of a text file, a directory, a glob, or `stdlib`.

    Raises `DataError` as `find_files` does, and if a file holds records or describes a mixture.
    """
    if is_mixture_file(source):
        raise DataError(
            f"{quoted(Path(source))} describes a mixture, and this command reads text; give one of its sources"
        )
    found = find_files(source)
    if records := next((file for file in found.files if record_format(file.path)), None):
        raise DataError(
            f"{quoted(records.path)} holds records, and this command reads text; give text files, or a glob of them"
        )
    return found


def find_files(source: str | Path) -> Documents:
    """Return the files of a source, of text or of records.

    Hidden and empty files are skipped, and in a directory also the files of training runs. Several documents are sorted
    by a hash of their names. That order is the same on every machine and independent of the names' meaning, so that the
    last tenth is a fair sample. Raises `DataError` if there is no file.
    """
    if not str(source):
        raise DataError(f"the data has an empty name; give a file, a directory, a glob, or {STDLIB}")
    if str(source) == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return in_order(source, root, (p for p in _walk(root, _NOT_STDLIB) if p.suffix == ".py"))
    path = Path(source).absolute()
    if path.is_dir():
        return in_order(source, path, _walk(path))
    if path.is_file():
        return in_order(source, path.parent, [path])
    return in_order(source, _root_of_glob(path), matching_files(path))


def matching_files(source: str | Path) -> list[Path]:
    """Return the files that a glob matches, sorted by name. `**` matches directories. Raises `DataError` if none do."""
    found = [Path(name) for name in sorted(glob.glob(str(source), recursive=True))]
    if files := [path for path in found if path.is_file()]:
        return files
    if glob.has_magic(str(source)):
        raise DataError(f"no file matches {quoted(Path(source))}")
    raise DataError(f"{quoted(Path(source))} does not exist; give a file, a directory, a glob, or {STDLIB}")


def in_order(source: str | Path, root: Path, paths: Iterable[Path]) -> Documents:
    """Return files below `root` as documents, without empty ones, in the order of `find_files`."""
    documents = []
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"cannot read {quoted(path)}: {error.strerror}") from error
        if status.st_size:
            name = path.relative_to(root).as_posix()
            documents.append(Document(name, path, status.st_size, status.st_mtime_ns))
    if not documents:
        raise DataError(f"{quoted(source)} has no text: every file is empty, hidden, or excluded")
    return Documents(str(source), tuple(sorted(documents, key=lambda d: _hash(d.name))))


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def _walk(root: Path, without: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield every file below `root`, except hidden files, files of runs, and directories named in `without`."""
    for directory, subdirectories, names in os.walk(root, onerror=_raise_unreadable):
        if RUN in names:  # a run's output must not become its data, which would change on resume
            subdirectories.clear()
            continue
        subdirectories[:] = [d for d in subdirectories if not d.startswith(".") and d not in without]
        paths = (Path(directory, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"cannot read {quoted(Path(error.filename))}: {error.strerror}") from error


def _root_of_glob(pattern: Path) -> Path:
    return next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))


def _last_cut(text: str) -> int:
    """Return the last index at which `text` can be split without splitting a token, or 0 if no such index exists."""
    for start in (max(0, len(text) - 1024), 0):
        if cuts := [match.start() for match in _CUT.finditer(text, start)]:
            return cuts[-1]
    return len(text) if len(text) >= MAX_BLOCK_BYTES else 0

"""The documents of a text source, and their text in blocks that no token crosses."""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bridge.errors import quoted
from bridge.formats.run import RUN
from gpt2_jax.data.errors import DataError

STDLIB = "stdlib"
"""The source that every machine has: the running interpreter's standard library."""

BLOCK_BYTES = 2**18
"""Text is read and encoded in pieces of about this size; large enough that a piece is worth a thread."""

LONGEST_BLOCK = 16 * BLOCK_BYTES
"""Where so much text has no place to cut, it is cut anywhere; no language writes such words."""

_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})

# GPT-2's pattern puts white space at the beginning of a word or apart, never at its end, so a word
# ends wherever white space follows something else. Space and newline are white space to every
# regular expression; Python's \S and Rust's differ in characters that this leaves out.
_CUT = re.compile(r"(?<=\S)(?=[ \n])")


@dataclass(frozen=True)
class Document:
    """One text file. `name` is its path inside the source, with slashes on every system."""

    name: str
    path: Path
    size: int
    """Bytes."""
    modified: int
    """Nanoseconds since 1970."""

    def is_text(self) -> bool:
        """Whether all of it is UTF-8 without NUL bytes, which no text has."""
        try:
            return all("\0" not in text for text in self._decoded())
        except UnicodeDecodeError:
            return False

    def blocks(self) -> Iterator[str]:
        """The text in pieces of `BLOCK_BYTES` or so; encoded apart they give the tokens of the whole.

        Raises `DataError` where it is not UTF-8. Line ends stay as they are in the file; a byte-order mark at its
        start, which some editors write, is not part of the text.
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
        decoder = codecs.getincrementaldecoder("utf-8-sig")()  # leaves out a byte-order mark at the start
        try:
            with self.path.open("rb") as file:
                while block := file.read(BLOCK_BYTES):
                    yield decoder.decode(block)
        except OSError as error:
            raise DataError(f"cannot read {quoted(self.path)}: {error.strerror}") from error
        decoder.decode(b"", final=True)


@dataclass(frozen=True)
class Documents:
    """The documents of one source, in the order in which they are trained on."""

    source: str
    files: tuple[Document, ...]

    @property
    def size(self) -> int:
        """Bytes of all documents."""
        return sum(document.size for document in self.files)

    def readable(self) -> Iterator[Document]:
        """Those that are text. In a directory others are passed over; a source of one must be text."""
        yield from self.files if len(self.files) == 1 else (d for d in self.files if d.is_text())


def find_documents(source: str | Path) -> Documents:
    """The documents of a text file, a directory, a glob, or `stdlib`.

    Hidden and empty files are left out, and in a directory what training runs wrote. Many documents come
    in the order of a hash of their names, the same on every machine and unlike any order that people give
    them, so that the last tenth is a fair sample. Raises `DataError` where there is no document.
    """
    if not str(source):
        raise DataError(f"the data has an empty name; give a file, a directory, a glob, or {STDLIB}")
    if str(source) == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return _sorted(source, root, (p for p in _walk(root, _NOT_STDLIB) if p.suffix == ".py"))
    path = Path(source).absolute()
    if path.is_dir():
        return _sorted(source, path, _walk(path))
    if path.is_file():
        return _sorted(source, path.parent, [path])
    return _sorted(source, _root_of_glob(path), matching_files(path))


def matching_files(source: str | Path) -> list[Path]:
    """The files that a glob matches, by name; `**` crosses directories. `DataError` where there is none."""
    found = [Path(name) for name in sorted(glob.glob(str(source), recursive=True))]
    if files := [path for path in found if path.is_file()]:
        return files
    if glob.has_magic(str(source)):
        raise DataError(f"no file matches {quoted(Path(source))}")
    raise DataError(f"{quoted(Path(source))} does not exist; give a file, a directory, a glob, or {STDLIB}")


def _sorted(source: str | Path, root: Path, paths: Iterator[Path] | list[Path]) -> Documents:
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
        raise DataError(f"{quoted(source)} has no text: every file is empty, hidden, or left out")
    return Documents(str(source), tuple(sorted(documents, key=lambda d: _hash(d.name))))


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def _walk(root: Path, without: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Every file below `root` that is neither hidden, nor a run's, nor in a directory named in `without`."""
    for directory, subdirectories, names in os.walk(root, onerror=_refuse):
        if RUN in names:  # what a run writes is not what it reads: it would find other data when it is resumed
            subdirectories.clear()
            continue
        subdirectories[:] = [d for d in subdirectories if not d.startswith(".") and d not in without]
        paths = (Path(directory, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


def _refuse(error: OSError) -> None:
    raise DataError(f"cannot read {quoted(Path(error.filename))}: {error.strerror}") from error


def _root_of_glob(pattern: Path) -> Path:
    return next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))


def _last_cut(text: str) -> int:
    """Where to cut `text` so that no token crosses the cut; 0 while there is no such place."""
    for start in (max(0, len(text) - 1024), 0):
        if cuts := [match.start() for match in _CUT.finditer(text, start)]:
            return cuts[-1]
    return len(text) if len(text) >= LONGEST_BLOCK else 0

"""Read a file, decompressed, as a stream. Memory is bounded for any content."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from bridge.errors import install_command, quoted
from bridge.storage.regular_file import open_regular_file
from gpt2_jax.data.errors import DataError
from gpt2_jax.data.file_kinds import compression_of

BUFFER_BYTES = 2**18
MOST_EXPANSION = 200
"""Limit on the size of the content as a multiple of the file's size. Text compresses to a third, very repetitive logs
to a hundredth."""
EXPANSION_CHECKED_FROM = 2**24
"""Contents up to this size, in bytes, may have any ratio."""
MOST_XZ_BYTES = 2**27
"""Limit on the memory of xz. The highest preset, -9, needs 65 MiB."""

_ARCHIVES = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
}
_TAR_MAGIC, _TAR_OFFSET = b"ustar", 257


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def import_pyarrow(what: str) -> Any:
    """Import pyarrow. `what` needs it, such as "Parquet". Raises `DataError` if it is not installed."""
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise DataError(f"{what} needs pyarrow; install it: {install_command('data')}") from None
    return pyarrow


class Stream(io.BufferedReader):
    """The decompressed content of a file."""

    def __init__(self, content: _Content) -> None:
        super().__init__(content, BUFFER_BYTES)
        self._content = content

    @property
    def position(self) -> int:
        """The bytes of the file that were read so far, before decompression."""
        return self._content.file.tell()


@contextmanager
def open_stream(path: Path) -> Iterator[Stream]:
    """Open a file that may be compressed.

    Raises:
        DataError: while opening or reading: the file cannot be read, is damaged, expands more than `MOST_EXPANSION`
            times, or contains another archive.
    """
    try:
        with open_regular_file(path, DataError) as file, Stream(_Content(path, file)) as stream:
            if compression_of(path) and (inner := _archive_in(stream.peek(512))):
                raise DataError(
                    f"{quoted(path)} contains a {inner} archive; extract it, and compress each file by itself"
                )
            yield stream
    except OSError as error:
        raise DataError(f"cannot read {quoted(path)}: {error.strerror or quoted(error)}") from error


def require_bounded(path: Path, size: int, produced: int) -> None:
    """Raise `DataError` if the first `size` bytes of a file gave too much content, `produced` bytes."""
    if produced > max(EXPANSION_CHECKED_FROM, MOST_EXPANSION * size):
        raise DataError(
            f"{quoted(path)} expands to more than {MOST_EXPANSION} times its size, like a decompression bomb; if you "
            "trust it, decompress it or write it as JSON lines"
        )


class _Content(io.RawIOBase):
    """The decompressed bytes, with bounds and with one kind of error."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path: Path = path
        self.file: BinaryIO = file
        self.produced: int = 0
        self._reader = _reader(path, file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._reader.read(len(buffer))
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise _damaged(self.path, error) from None
        except OSError as error:
            if error.errno is None:  # pyarrow's errors
                raise _damaged(self.path, error) from None
            raise
        self.produced += len(data)
        if self._reader is not self.file:
            require_bounded(self.path, self.file.tell(), self.produced)
        buffer[: len(data)] = data
        return len(data)


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{quoted(path)} cannot be decompressed: {quoted(error)}; copy or write it again")


def _reader(path: Path, file: BinaryIO) -> _Readable:
    compression = compression_of(path)
    if compression == "gzip":
        return gzip.GzipFile(fileobj=file)
    if compression == "xz":
        return _XZReader(file)
    if compression == "zstd":
        pyarrow = import_pyarrow(f"{quoted(path)}: Zstandard")
        return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
    return file


class _XZReader:
    """Decompress .xz with a limit on memory, which `lzma.LZMAFile` does not have."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decompressor = _new_xz()

    def read(self, size: int, /) -> bytes:
        while True:
            data = b""
            if self._decompressor.eof:
                # A file may have several streams, and zeros after each.
                data = (self._decompressor.unused_data or self._file.read(BUFFER_BYTES)).lstrip(b"\0")
                if not data:
                    return b""
                self._decompressor = _new_xz()
            elif self._decompressor.needs_input and not (data := self._file.read(BUFFER_BYTES)):
                raise EOFError("it ends before the end of its stream")
            if out := self._decompressor.decompress(data, size):
                return out


def _new_xz() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MOST_XZ_BYTES)


def _archive_in(beginning: bytes) -> str | None:
    if beginning[_TAR_OFFSET:].startswith(_TAR_MAGIC):
        return "tar"
    return next((name for magic, name in _ARCHIVES.items() if beginning.startswith(magic)), None)

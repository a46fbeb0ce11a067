"""A strict reader of zip archives with uncompressed records, as torch writes them.

Zip readers interpret inconsistent files differently, so a scanner may check other bytes than the loader reads.
Everything that torch does not write is therefore refused: compression, encryption, trailing comments, records that
share bytes or names, and headers that differ from the directory.

Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT. Comments give its section numbers.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from bridge.errors import CheckpointError, quoted
from bridge.storage.stored_file import StoredFile

# GPT-2 XL with AdamW's state has 2,400 records of 100 bytes in the directory.
MOST_RECORDS = 10_000
MOST_DIRECTORY_BYTES = 2**22

_LOCAL = struct.Struct("<4s5H3I2H")  # 4.3.7
_CENTRAL = struct.Struct("<4s6H3I5H2I")  # 4.3.12
_END64 = struct.Struct("<4sQ2H2I4Q")  # 4.3.14
_LOCATOR64 = struct.Struct("<4sIQI")  # 4.3.15
_END = struct.Struct("<4s4H2IH")  # 4.3.16
_DIRECTORY = 0x10  # an MS-DOS attribute
_SEE_ZIP64_16, _SEE_ZIP64_32 = 0xFFFF, 0xFFFFFFFF
_ZIP64_EXTRA = 1
_SIZES_FOLLOW, _UTF8 = 1 << 3, 1 << 11  # 4.4.4
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Record:
    name: str
    header: int
    """Position of the header in the file."""
    data: int
    """Position of the content in the file."""
    size: int
    crc: int
    """CRC-32 of the content; 0 if the writer did not compute it."""


@dataclass
class Archive:
    """The records of a zip file. All methods raise `CheckpointError` if the file is damaged."""

    file: StoredFile
    records: Mapping[str, Record]
    _intact: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, file: StoredFile) -> Archive:
        """Read the directory and the header of each record, but no content."""
        archive = cls(file, _records(file))
        _require_disjoint(file, archive.records)
        return archive

    def read(self, name: str) -> bytes:
        record = self.records[name]
        return self.read_part(name, 0, record.size).tobytes()

    def read_part(self, name: str, start: int, count: int) -> np.ndarray:
        """Return `count` bytes of a record from `start`, as `uint8`. The first call verifies the record's CRC."""
        record = self.records[name]
        if not 0 <= start <= start + count <= record.size:
            raise CheckpointError(f"{quoted(self.file.path)}: {quoted(name)} has only {record.size} bytes")
        part = self.file.entry(np.dtype(np.uint8), (count,), record.data + start).read()
        if record.crc and name not in self._intact:
            crc = zlib.crc32(part.data) if count == record.size else self._crc(record)
            if crc != record.crc:
                raise CheckpointError(
                    f"{quoted(self.file.path)}: {quoted(name)} does not match its checksum (CRC-32); the file is "
                    "damaged; download it again"
                )
            self._intact.add(name)
        return part

    def _crc(self, record: Record) -> int:
        crc = 0
        for start in range(0, record.size, _CHUNK_BYTES):
            crc = zlib.crc32(self.file.read(record.data + start, min(_CHUNK_BYTES, record.size - start)), crc)
        return crc


def _records(file: StoredFile) -> dict[str, Record]:
    start, size, count = _directory(file)
    if count > MOST_RECORDS or size > MOST_DIRECTORY_BYTES:
        raise CheckpointError(
            f"{quoted(file.path)}: a zip with {count} records and a directory of {size} bytes; the limits are "
            f"{MOST_RECORDS} and {MOST_DIRECTORY_BYTES}"
        )
    content = file.read(start, size)
    records: dict[str, Record] = {}
    names = set()
    position = 0
    for _ in range(count):
        record, position = _record(file, content, position, start)
        if record.name.lower() in names:  # torch ignores case in the names of records
            raise CheckpointError(f"{quoted(file.path)}: two records have the name {quoted(record.name)}")
        names.add(record.name.lower())
        records[record.name] = record
    if position != size:
        raise _damaged(file, "its directory is longer than its records")
    return records


def _directory(file: StoredFile) -> tuple[int, int, int]:
    """Return the position of the directory, its size in bytes and the number of records (4.3.16, 4.3.14)."""
    end_at = file.size - _END.size
    if end_at < 0:
        raise _damaged(file, "it is truncated or not a zip file")
    magic, *disks, on_disk, count, size, start, comment = _END.unpack(file.read(end_at, _END.size))
    if magic != b"PK\5\6" or comment:
        raise _damaged(file, "it is truncated, or has data after its end")
    ends_at = end_at
    locator_at = end_at - _LOCATOR64.size
    located = file.read(locator_at, _LOCATOR64.size) if locator_at >= 0 else b""
    if located.startswith(b"PK\6\7"):
        _, disk, ends_at, disks_in_all = _LOCATOR64.unpack(located)
        if disk or disks_in_all > 1 or ends_at + _END64.size != locator_at:
            raise _damaged(file, "its end record is not at the position that it states")
        magic, length, _, _, *wide_disks, wide_on_disk, wide_count, wide_size, wide_start = _END64.unpack(
            file.read(ends_at, _END64.size)
        )
        if magic != b"PK\6\6" or length != _END64.size - 12:
            raise _damaged(file, "its end record is not at the position that it states")
        pairs = ((on_disk, wide_on_disk), (count, wide_count), (size, wide_size), (start, wide_start))
        if any(narrow not in (wide, _SEE_ZIP64_16, _SEE_ZIP64_32) for narrow, wide in pairs):
            raise _damaged(file, "its two end records differ")
        disks += wide_disks
        on_disk, count, size, start = wide_on_disk, wide_count, wide_size, wide_start
    if any(disks) or on_disk != count or start + size != ends_at:
        raise _damaged(file, "its directory is not at the position that it states")
    return start, size, count


def _record(file: StoredFile, directory: bytes, position: int, data_end: int) -> tuple[Record, int]:
    """Return a record of the directory (4.3.12), checked against its local header (4.3.7), and the next position."""
    fixed = directory[position : position + _CENTRAL.size]
    if len(fixed) < _CENTRAL.size or not fixed.startswith(b"PK\1\2"):
        raise _damaged(file, "its directory is damaged")
    _, _, _, flags, method, _, _, crc, stored, size, *lengths, disk, _, external, header = _CENTRAL.unpack(fixed)
    position += _CENTRAL.size
    parts = []
    for length in lengths:  # of the name, the extra fields and the comment
        parts.append(directory[position : position + length])
        position += length
    if position > len(directory):
        raise _damaged(file, "its directory is damaged")
    try:
        name = parts[0].decode()
    except UnicodeDecodeError:
        raise _damaged(file, "a record's name is not UTF-8") from None
    size, stored, header = _wide(file, name, parts[1], [size, stored, header])
    if flags & ~(_SIZES_FOLLOW | _UTF8) or method or stored != size or disk:
        raise CheckpointError(
            f"{quoted(file.path)}: {quoted(name)} is compressed, encrypted or patched, which torch does not write; "
            "load it with torch and torch.save it again"
        )
    if external & _DIRECTORY:
        raise _damaged(file, f"{quoted(name)} is marked as a directory, which torch would read as zeros")
    data = _data_start(file, parts[0], header, flags, crc, size)
    if data + size > data_end:
        raise _damaged(file, f"{quoted(name)} is outside the data")
    return Record(name, header, data, size, crc), position


def _wide(file: StoredFile, name: str, extra: bytes, values: list[int]) -> list[int]:
    """Return `values`, with those that do not fit into 32 bits taken from the extra fields (4.5.3)."""
    position, wide = 0, b""
    while position < len(extra):
        kind, length = struct.unpack("<2H", extra[position : position + 4].ljust(4, b"\xff"))
        position += 4 + length
        if position > len(extra) or (kind == _ZIP64_EXTRA and wide):
            raise _damaged(file, f"the extra fields of {quoted(name)} are damaged")
        if kind == _ZIP64_EXTRA:
            wide = extra[position - length : position]
    missing = [i for i, value in enumerate(values) if value == _SEE_ZIP64_32]
    if len(wide) < 8 * len(missing):
        raise _damaged(file, f"the size of {quoted(name)} is missing")
    for i, value in zip(missing, struct.unpack_from(f"<{len(missing)}Q", wide), strict=True):
        values[i] = value
    return values


def _data_start(file: StoredFile, name: bytes, at: int, flags: int, crc: int, size: int) -> int:
    """Return the position of a record's content, after comparing its local header with the directory."""
    fixed = file.read(at, _LOCAL.size + len(name))
    magic, _, own_flags, method, _, _, *own, name_length, extra_length = _LOCAL.unpack(fixed[: _LOCAL.size])
    expected = [crc, size, size]
    agrees = all(
        mine in (theirs, _SEE_ZIP64_32) or (mine == 0 and flags & _SIZES_FOLLOW)
        for mine, theirs in zip(own, expected, strict=True)
    )
    same_name = name_length == len(name) and fixed[_LOCAL.size :] == name
    if magic != b"PK\3\4" or own_flags != flags or method or not agrees or not same_name:
        raise _damaged(file, f"the header of {quoted(name.decode())} differs from the directory")
    return at + _LOCAL.size + name_length + extra_length


def _require_disjoint(file: StoredFile, records: Mapping[str, Record]) -> None:
    end = 0
    for record in sorted(records.values(), key=lambda record: record.header):
        if record.header < end:
            raise _damaged(file, f"{quoted(record.name)} shares bytes with another record")
        end = record.data + record.size


def _damaged(file: StoredFile, why: str) -> CheckpointError:
    return CheckpointError(f"{quoted(file.path)} is damaged, or is not a zip file of torch: {why}")

"""The zip reader: compared with the standard library, and archives whose headers contradict each other."""

from __future__ import annotations

import io
import os
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from support.refusals import MOST_SECONDS

from bridge import CheckpointError
from bridge.containers.zip_records import MOST_RECORDS, Archive
from bridge.storage.stored_file import StoredFile

ZIP64 = 0xFFFFFFFF


@dataclass(frozen=True)
class Member:
    """One record, and the contents of its two headers. `own_*` are fields of the local header."""

    name: str = "a/data"
    content: bytes = b"weights"
    crc: int | None = None
    flags: int = 0
    own_flags: int | None = None
    method: int = 0
    own_name: str | None = None
    own_sizes: tuple[int, int] | None = None
    sizes: tuple[int, int] | None = None
    extra: bytes = b""
    own_extra: bytes = b""
    comment: bytes = b""
    disk: int = 0
    header: int | None = None


def member_header(m: Member) -> bytes:
    name = (m.own_name or m.name).encode()
    own_flags = m.flags if m.own_flags is None else m.own_flags
    numbers = (checksum(m), *(m.own_sizes or (len(m.content),) * 2), len(name), len(m.own_extra))
    return struct.pack("<4s5H3I2H", b"PK\3\4", 20, own_flags, m.method, 0, 0, *numbers) + name + m.own_extra


def checksum(m: Member) -> int:
    return zlib.crc32(m.content) if m.crc is None else m.crc


def directory_entry(m: Member, header: int) -> bytes:
    name = m.name.encode()
    fixed = struct.pack(
        "<4s6H3I5H2I",
        *(b"PK\1\2", 20, 20, m.flags, m.method, 0, 0, checksum(m), *(m.sizes or (len(m.content),) * 2)),
        *(len(name), len(m.extra), len(m.comment), m.disk, 0, 0, header if m.header is None else m.header),
    )
    return fixed + name + m.extra + m.comment


def end(count: int, size: int, start: int, comment: bytes = b"") -> bytes:
    return struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, size, min(start, ZIP64), len(comment)) + comment


def zipped(*members: Member, ending: Callable[[int, int, int], bytes] = end) -> bytes:
    """Return the archive. `ending` takes the number of records, and the size and start of the directory."""
    content, directory = b"", b""
    for m in members:
        directory += directory_entry(m, len(content))
        content += member_header(m) + m.content
    return content + directory + ending(len(members), len(directory), len(content))


def wide_end(**changed: int) -> Callable[[int, int, int], bytes]:
    """Return an `ending` with a zip64 end record before the usual one, as torch always writes it."""

    def ending(count: int, size: int, start: int) -> bytes:
        wide = {"length": 44, "disk": 0, "count": count, "size": size, "start": start, "at": start + size, **changed}
        numbers = (wide["disk"], 0, wide["count"], wide["count"], wide["size"], wide["start"])
        record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", wide["length"], 45, 45, *numbers)
        return record + struct.pack("<4sIQI", b"PK\6\7", 0, wide["at"], 1) + end(count, size, start)

    return ending


def opened(path: Path, content: bytes) -> Archive:
    path.write_bytes(content)
    return Archive.open(StoredFile.open(path))


@pytest.mark.parametrize("wide", [False, True])
def test_archives_of_the_standard_library_are_read(tmp_path: Path, wide: bool) -> None:
    contents = {"a/ä": b"", "a/0": b"x", "a/data/1": os.urandom(3 * 2**20)}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, content in contents.items():
            with file.open(name, "w", force_zip64=wide) as record:
                record.write(content)
    archive = opened(tmp_path / "f", out.getvalue())
    assert {name: archive.read(name) for name in archive.records} == contents
    assert archive.read_part("a/data/1", 5, 7).tobytes() == contents["a/data/1"][5:12]


def test_the_standard_library_reads_the_archives_of_these_tests(tmp_path: Path) -> None:
    for content in (zipped(Member()), zipped(Member(), Member("a/b", b""), ending=wide_end())):
        assert opened(tmp_path / "f", content).read("a/data") == b"weights"
        assert zipfile.ZipFile(io.BytesIO(content)).read("a/data") == b"weights"


VALID: dict[str, Member] = {
    "no checksum": Member(crc=0),
    "sizes that follow": Member(flags=8, own_sizes=(0, 0)),
    "a UTF-8 name": Member("a/data", flags=0x800),
    "other extra fields": Member(extra=struct.pack("<2H4s", 0x5455, 4, b"time"), own_extra=b"FB\2\0ZZ"),
    "a comment on the record": Member(comment=b"of a record"),
    "sizes in 64 bits": Member(
        sizes=(ZIP64, ZIP64), own_sizes=(ZIP64, ZIP64), extra=struct.pack("<2H2Q", 1, 16, 7, 7), own_extra=b""
    ),
    "a place in 64 bits": Member(header=ZIP64, extra=struct.pack("<2HQ", 1, 8, 0)),
}


@pytest.mark.parametrize("member", VALID.values(), ids=VALID)
def test_every_valid_form_of_the_headers_is_read(tmp_path: Path, member: Member) -> None:
    assert opened(tmp_path / "f", zipped(member)).read("a/data") == b"weights"


GOOD = Member()
CONTRADICTING: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated or not a zip file"),
    "a comment at the end": (zipped(GOOD, ending=lambda *n: end(*n, b"PK")), "data after its end"),
    "an end within a comment": (
        zipped(GOOD, ending=lambda *n: end(*n, end(0, 0, 0))),
        "its directory is not at the position that it states",
    ),
    "something before": (b"#!/bin/sh\n" + zipped(GOOD), "its directory is not at the position that it states"),
    "bytes before the end": (zipped(GOOD, ending=lambda *n: b"x" + end(*n)), "is not at the position that it states"),
    "fewer records": (zipped(GOOD, GOOD, ending=lambda n, *at: end(1, *at)), "is longer than its records"),
    "more records": (zipped(GOOD, ending=lambda n, *at: end(2, *at)), "its directory is damaged"),
    "a million records": (zipped(GOOD, ending=wide_end(count=10**6)), "its two end records differ"),
    "another count in 64 bits": (zipped(GOOD, ending=wide_end(count=0)), "its two end records differ"),
    "another start in 64 bits": (zipped(GOOD, ending=wide_end(start=1)), "its two end records differ"),
    "a locator that points elsewhere": (
        zipped(GOOD, ending=wide_end(at=3)),
        "its end record is not at the position that it states",
    ),
    "a longer end": (zipped(GOOD, ending=wide_end(length=45)), "its end record is not at the position that it states"),
    "several disks": (zipped(GOOD, ending=wide_end(disk=1)), "its directory is not at the position that it states"),
    "on another disk": (zipped(replace(GOOD, disk=1)), "compressed, encrypted or patched"),
    "two of one name": (zipped(GOOD, GOOD), "two records have the name 'a/data'"),
    "two of one name but for case": (zipped(GOOD, Member("a/DATA")), "two records have the name 'a/DATA'"),
    "two of one header": (zipped(Member("a/x"), Member("a/y", own_name="a/x", header=0)), "header of 'a/y' differs"),
    "overlapping": (
        zipped(Member("a/x", content=member_header(Member("a/y")) + b"weights"), Member("a/y", header=33)),
        "'a/y' shares bytes with another record",
    ),
    "another own name": (zipped(replace(GOOD, own_name="a/dato")), "header of 'a/data' differs"),
    "a longer own name": (zipped(replace(GOOD, own_name="a/data.pkl")), "header of 'a/data' differs"),
    "another own size": (zipped(replace(GOOD, own_sizes=(7, 6))), "header of 'a/data' differs"),
    "no own size": (zipped(replace(GOOD, own_sizes=(0, 0))), "header of 'a/data' differs"),
    "other own flags": (zipped(replace(GOOD, own_flags=8)), "header of 'a/data' differs"),
    "encrypted": (zipped(replace(GOOD, flags=1)), "encrypted"),
    "strongly encrypted": (zipped(replace(GOOD, flags=0x41)), "encrypted"),
    "patch data": (zipped(replace(GOOD, flags=0x20)), "patched"),
    "a masked header": (zipped(replace(GOOD, flags=0x2000)), "encrypted"),
    "deflated": (zipped(replace(GOOD, method=8)), "compressed"),
    "sizes that differ": (zipped(replace(GOOD, sizes=(6, 7), own_sizes=(6, 7))), "compressed"),
    "a size past the directory": (
        zipped(replace(GOOD, sizes=(8, 8), own_sizes=(8, 8))),
        "is outside the data",
    ),
    "a size of 2^63": (
        zipped(replace(GOOD, sizes=(ZIP64, ZIP64), extra=struct.pack("<2H2Q", 1, 16, 2**63, 2**63))),
        "header of 'a/data' differs",
    ),
    "a place of 2^63": (zipped(replace(GOOD, header=ZIP64, extra=struct.pack("<2HQ", 1, 8, 2**63))), "are needed"),
    "a size that is missing": (zipped(replace(GOOD, sizes=(ZIP64, ZIP64))), "the size of 'a/data' is missing"),
    "extra fields truncated": (zipped(replace(GOOD, extra=b"\1\0\x10\0abc")), "extra fields of 'a/data' are damaged"),
    "half an extra field": (zipped(replace(GOOD, extra=b"\1")), "extra fields of 'a/data' are damaged"),
    "two sizes in 64 bits": (
        zipped(replace(GOOD, extra=2 * struct.pack("<2HQ", 1, 8, 7))),
        "extra fields of 'a/data' are damaged",
    ),
}


@pytest.mark.parametrize(("content", "message"), CONTRADICTING.values(), ids=CONTRADICTING)
def test_contradicting_headers_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(tmp_path / "the file", content)
    assert "the file" in str(caught.value)


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not UTF-8"):
        opened(tmp_path / "f", zipped(GOOD).replace(b"a/data", b"a/\xff\xfeta"))


def test_a_wrong_checksum_is_an_error_for_a_part_and_for_the_whole_record(tmp_path: Path) -> None:
    archive = opened(tmp_path / "f", zipped(replace(GOOD, crc=1), Member("a/good")))
    assert archive.read("a/good") == b"weights"
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"'a/data' does not match its checksum"):
            archive.read_part("a/data", 2, 3)
        with pytest.raises(CheckpointError, match=r"'a/data' does not match its checksum"):
            archive.read("a/data")


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 8), (7, 1), (2, -1)])
def test_a_part_outside_its_record_is_refused(tmp_path: Path, start: int, count: int) -> None:
    with pytest.raises(CheckpointError, match="has only 7 bytes"):
        opened(tmp_path / "f", zipped(GOOD)).read_part("a/data", start, count)


def test_a_record_after_4_gib_is_found_by_its_64_bit_offset(tmp_path: Path) -> None:
    """The file is sparse and laid out as torch does: 64-bit sizes in the directory, and a zip64 end record."""
    size, path = 5 * 2**30, tmp_path / "f"
    first = member_header(Member("a/0", b"", crc=0, own_sizes=(ZIP64, ZIP64)))
    second_at = len(first) + size
    in_64 = [struct.pack("<2H2Q", 1, 16, size, size), struct.pack("<2HQ", 1, 8, second_at)]
    directory = directory_entry(Member("a/0", b"", crc=0, sizes=(ZIP64, ZIP64), extra=in_64[0]), 0)
    directory += directory_entry(Member("a/1", extra=in_64[1], header=ZIP64), 0)
    with open(path, "wb") as file:
        file.write(first)
        file.seek(second_at - 4)
        file.write(b"last" + member_header(Member("a/1")) + b"weights")
        start = file.tell()
        file.write(directory + wide_end()(2, len(directory), start))
    archive = Archive.open(StoredFile.open(path))
    assert archive.records["a/0"].size == size
    assert archive.read_part("a/0", size - 4, 4).tobytes() == b"last"
    assert archive.read("a/1") == b"weights"
    with zipfile.ZipFile(path) as theirs:
        assert [(i.filename, i.file_size) for i in theirs.infolist()] == [("a/0", size), ("a/1", 7)]


# Limits on time and size


def test_the_limit_on_records_is_exact(tmp_path: Path) -> None:
    members = [Member(f"a/data/{k}", b"x") for k in range(MOST_RECORDS + 1)]
    began = time.process_time()
    assert len(opened(tmp_path / "f", zipped(*members[1:])).records) == MOST_RECORDS
    with pytest.raises(CheckpointError, match="a zip with 10001 records"):
        opened(tmp_path / "f", zipped(*members))
    assert time.process_time() - began < MOST_SECONDS


def test_long_extra_fields_do_not_take_quadratic_time(tmp_path: Path) -> None:
    fields = b"".join(struct.pack("<2H", kind, 0) for kind in range(2, 16_000))
    content = zipped(*(Member(f"a/{k}", extra=fields) for k in range(60)))
    began = time.process_time()
    assert len(opened(tmp_path / "f", content).records) == 60
    assert time.process_time() - began < MOST_SECONDS


def test_a_directory_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the limits are 10000 and 4194304"):
        opened(tmp_path / "f", zipped(*(Member(f"a/{k}", comment=bytes(65_000)) for k in range(70))))

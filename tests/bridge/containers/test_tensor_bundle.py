"""TensorFlow's checkpoint container: files of TensorFlow, and tables built here from LevelDB's specification."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from fuzz.openai import FILES
from support.refusals import assert_refused

from bridge import BridgeError, CheckpointError, ConversionError
from bridge.containers import tensor_bundle
from bridge.containers.tensor_bundle import is_index, read_bundle

MAGIC = bytes.fromhex("57fb808b247547db")
DTYPES: Mapping[int, type] = {
    1: np.float32,
    2: np.float64,
    3: np.int32,
    4: np.uint8,
    5: np.int16,
    6: np.int8,
    9: np.int64,
    10: np.bool_,
    14: ml_dtypes.bfloat16,
    19: np.float16,
}
SIZES = {"n_vocab": 11, "n_ctx": 5, "n_embd": 8, "n_head": 2, "n_layer": 1}
Entry = tuple[bytes, bytes]


def masked_crc32c(content: bytes) -> int:
    """Compute the checksum bit by bit."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def varint(number: int) -> bytes:
    low, rest = number % 128, number // 128
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def field(number: int, value: int | bytes) -> bytes:
    """Return one field of a protocol buffer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def shape_of(*dims: int) -> bytes:
    return b"".join(field(2, field(1, dim)) for dim in dims)


def header(files: int = 1, more: bytes = b"") -> Entry:
    return b"", field(1, files) + more + field(3, field(1, 1))


def entry(name: bytes = b"w", kind: int = 1, shape: bytes | None = None, crc: int = 0, **numbers: int) -> Entry:
    """Return the entry of a tensor, by default two float32 at the start of the only data file."""
    places = {3: numbers.get("file", 0), 4: numbers.get("offset", 0), 5: numbers.get("size", 8)}
    value = field(1, kind) + field(2, shape_of(2) if shape is None else shape)
    value += b"".join(field(number, place) for number, place in places.items())
    return name, value + varint(6 << 3 | 5) + crc.to_bytes(4, "little")


def block(entries: Iterable[Entry], restart_every: int = 1) -> bytes:
    """Return a block. A name omits the prefix that it shares with the previous name, except at restarts."""
    content, restarts, last = b"", [], b""
    for number, (name, value) in enumerate(entries):
        shared = 0
        if number % restart_every == 0:
            restarts.append(len(content))
        else:
            shared = next((i for i, (a, b) in enumerate(zip(last, name, strict=False)) if a != b), len(last))
        content += varint(shared) + varint(len(name) - shared) + varint(len(value)) + name[shared:] + value
        last = name
    return content + b"".join(r.to_bytes(4, "little") for r in (*restarts, len(restarts)))


def table(*blocks: bytes, kind: int = 0, handles: Iterable[bytes] | None = None) -> bytes:
    """Return an index of these blocks. `handles`: their locations, if not the true ones."""
    content, found = b"", []

    def put(block: bytes) -> bytes:
        nonlocal content
        handle = varint(len(content)) + varint(len(block))
        content += block + bytes([kind])
        content += masked_crc32c(block + bytes([kind])).to_bytes(4, "little")
        return handle

    for data in blocks:
        found.append(put(data))
    names = (b"k%04d" % number for number in range(10_000))
    metaindex = put(block([]))
    index = put(block(list(zip(names, found if handles is None else handles, strict=False))))
    return content + (metaindex + index).ljust(40, b"\0") + MAGIC


def written(path: Path, index: bytes, *files: bytes) -> Path:
    path.mkdir(exist_ok=True)
    (path / "hparams.json").write_text(json.dumps(SIZES))
    for number, content in enumerate(files):
        (path / f"m.data-{number:05d}-of-{len(files):05d}").write_bytes(content)
    (path / "m.index").write_bytes(index)
    return path


# Valid files


@pytest.mark.parametrize("entries_in_a_block", [1, 3, 1000])
@pytest.mark.parametrize("restart_every", [1, 2, 16])
def test_every_dtype_and_shape_is_read_from_several_files(
    tmp_path: Path, entries_in_a_block: int, restart_every: int
) -> None:
    rng = np.random.default_rng(0)
    arrays, entries, files = {}, [], [b"", b"", b""]
    for kind, dtype in DTYPES.items():
        for shape in [(3, 5), (7,), (), (0,), (2, 0, 3)]:
            name = f"model/h{kind}/of rank {len(shape)}/{math.prod(shape)} é"
            raw = rng.integers(0, 2 if dtype is np.bool_ else 256, math.prod(shape) * np.dtype(dtype).itemsize)
            content = raw.astype(np.uint8).tobytes()
            arrays[name] = np.frombuffer(content, dtype).reshape(shape)
            file = len(entries) % 3
            place = {"file": file, "offset": len(files[file]), "size": len(content)}
            entries.append(entry(name.encode(), kind, shape_of(*shape), masked_crc32c(content), **place))
            files[file] += content
    entries = [header(3), *sorted(entries)]
    parts = [entries[i : i + entries_in_a_block] for i in range(0, len(entries), entries_in_a_block)]
    directory = written(tmp_path / "d", table(*(block(part, restart_every) for part in parts)), *files)
    assert is_index(directory / "m.index")
    found = read_bundle(directory / "m.index")
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert (found.entries[name].dtype, found.entries[name].shape) == (array.dtype, array.shape)
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def test_training_state_saved_by_tensorflow_is_read(tmp_path: Path) -> None:
    """It has other dtypes than the weights. TensorFlow 2.21.0 wrote the file."""
    found = read_bundle(FILES / "adam" / "model.ckpt.index")
    assert (found["global_step"].dtype, found["global_step"].tolist()) == (np.int64, 3)
    assert found["beta1_power"] == np.float32(0.9)
    assert found["model/h1/mlp/c_fc/w/Adam_1"].shape == (1, 8, 32)
    assert not found["model/h1/mlp/c_fc/w/Adam_1"].any()


def test_a_gap_between_tensors_is_accepted_as_alignment(tmp_path: Path) -> None:
    data = bytes(range(24))
    entries = [header(), entry(crc=masked_crc32c(data[:8])), entry(b"x", offset=16, crc=masked_crc32c(data[16:]))]
    found = read_bundle(written(tmp_path / "d", table(block(entries)), data) / "m.index")
    assert found["x"].tobytes() == data[16:]


def test_every_access_verifies_the_checksum(tmp_path: Path) -> None:
    directory = written(tmp_path / "d", table(block([header(), entry(crc=masked_crc32c(bytes(7)))])), bytes(8))
    found = read_bundle(directory / "m.index")
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"m\.data-00000-of-00001' is damaged: 'w' does not match its checksum"
        ):
            found["w"]


# The checksum


def crc32c(content: bytes | memoryview) -> int:
    rotated = (tensor_bundle.masked_crc32c(content) - 0xA282EAD8) % 2**32
    return (rotated >> 17 | rotated << 15) % 2**32


def test_the_checksum_is_crc32c() -> None:
    """Expected values are those of RFC 3720, B.4, and of the bit-by-bit computation."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(b"") == 0
    rng = random.Random(0)
    for length in (1, 2, 255, 256, 257, 511, 513, 3000):
        content = rng.randbytes(length)
        assert tensor_bundle.masked_crc32c(content) == masked_crc32c(content), length


CHECKSUMS = {
    2**22 - 1: 1321687085,
    2**22: 598458372,
    2**22 + 1: 2820282405,
    2**23 + 1000: 1012202344,
}
"""Number of bytes -> checksum of that many bytes of the content below."""


def test_the_checksum_does_not_depend_on_chunks() -> None:
    content = np.random.default_rng(0).integers(0, 256, 2**23 + 1000, np.uint8).data
    assert {length: crc32c(content[:length]) for length in CHECKSUMS} == CHECKSUMS


# Hostile tables


def of(*entries: Entry) -> bytes:
    return table(block([header(), *entries]))


def raw(content: bytes, restarts: int = 0) -> bytes:
    """Return a table with one block whose entries are these bytes."""
    return table(content + restarts.to_bytes(4, "little"))


FIRST = b"\0\0\2\x08\1"  # the header as encoded in a block
NEGATIVE = 2**64 - 1  # -1 as encoded in a protocol buffer
# The index for a data file of 8 bytes, and a part of the error message.
MALFORMED: dict[str, tuple[bytes, str, type[BridgeError]]] = {
    "no header": (table(block([entry()])), "declares 0 data files", CheckpointError),
    "no entries": (table(block([])), "n_layer is 1, but there are 0 tensors", ConversionError),
    "no blocks": (table(), "n_layer is 1, but there are 0 tensors", ConversionError),
    "no parameter": (of(entry()), "model/wte is missing", ConversionError),
    "big-endian": (table(block([header(more=field(2, 1)), entry()])), "big-endian machine", CheckpointError),
    "a later version": (
        table(block([(b"", field(1, 1) + field(3, field(1, 2) + field(2, 2)))])),
        "a later checkpoint version",
        CheckpointError,
    ),
    "a version that excludes this one": (
        table(block([(b"", field(1, 1) + field(3, field(3, b"\1")))])),
        "a later checkpoint version",
        CheckpointError,
    ),
    "no files": (table(block([header(0)])), "declares 0 data files", CheckpointError),
    "2^31 files": (table(block([header(2**31)])), "declares 2147483648 data files", CheckpointError),
    "-1 files": (table(block([header(NEGATIVE)])), "declares 18446744073709551615 data files", CheckpointError),
    "a file that is not there": (table(block([header(2), entry()])), "m.data-00000-of-00002'", CheckpointError),
    "a string": (of(entry(kind=7)), "holds 'w' of TensorFlow's data type 7", CheckpointError),
    "a complex number": (of(entry(kind=8)), "data type 8", CheckpointError),
    "no type": (of(entry(kind=0)), "data type 0", CheckpointError),
    "quantised": (of(entry(kind=11)), "data type 11", CheckpointError),
    "whole numbers as weights": (of(entry(b"model/wte", 9, shape_of(1))), "holds int64", ConversionError),
    "a file too many": (of(entry(file=1)), "puts 'w' in data file 1; the data files are 0 to 0", CheckpointError),
    "file -1": (of(entry(file=NEGATIVE)), "in data file 18446744073709551615; the", CheckpointError),
    "past the end": (of(entry(offset=1)), "it has 8 bytes, and '8' bytes at offset '1' are needed", CheckpointError),
    "offset 2^63": (of(entry(offset=2**63)), "it has 8 bytes, and", CheckpointError),
    "offset -1": (of(entry(offset=NEGATIVE)), "it has 8 bytes, and", CheckpointError),
    "another size": (
        of(entry(size=4)),
        "has 4 bytes for 'w', which do not fit its shape '(2,)' and float32",
        CheckpointError,
    ),
    "a size too large": (of(entry(size=2**62, shape=shape_of(2**60))), "it has 8 bytes, and", CheckpointError),
    "a shape that overflows to 8 bytes": (of(entry(shape=shape_of(2**62 + 2))), "has 8 bytes", CheckpointError),
    "a shape that overflows to 0": (of(entry(shape=shape_of(2**32, 2**32), size=0)), "has 0 bytes", CheckpointError),
    "dimension -1": (of(entry(shape=shape_of(NEGATIVE))), "which has an invalid shape", CheckpointError),
    "unknown rank": (of(entry(shape=field(3, 1))), "which has an invalid shape", CheckpointError),
    "rank 17": (of(entry(shape=shape_of(*[1] * 16, 2))), "which has an invalid shape", CheckpointError),
    "rank 10,000": (of(entry(shape=shape_of(*[1] * 10_000))), "which has an invalid shape", CheckpointError),
    "slices": (of((b"w", entry()[1] + field(7, b""))), "holds 'w', a partitioned variable", CheckpointError),
    "overlapping": (of(entry(size=4, shape=shape_of(1)), entry(b"x")), "'x' overlaps the tensor", CheckpointError),
    "bytes after the last": (of(entry(size=4, shape=shape_of(1))), "4 bytes after the last tensor", CheckpointError),
    "the header twice": (of(header()), "names that are unordered or repeated", CheckpointError),
    "a name twice": (of(entry(), entry()), "names that are unordered or repeated", CheckpointError),
    "names out of order": (of(entry(b"x"), entry(b"w")), "names that are unordered", CheckpointError),
    "names out of order over blocks": (
        table(block([header(), entry(b"x")]), block([entry(b"w")])),
        "names that are unordered",
        CheckpointError,
    ),
    "an odd name": (of(entry(b"../\x1b[2J\n\xff")), "is not a parameter of this model", ConversionError),
    "a long name": (of(entry(b"n" * 1025)), "a name of more than 1024 bytes", CheckpointError),
    "too many tensors": (
        of(*(entry(b"%04d" % number, shape=shape_of(0), size=0) for number in range(4001))),
        "more than 4000 tensors",
        CheckpointError,
    ),
    "shares more than there is": (raw(FIRST + b"\1\1\1wx"), "exceeds its block", CheckpointError),
    "a name past the block": (raw(FIRST + b"\0\x7f\1wx"), "exceeds its block", CheckpointError),
    "a name of 2^63 bytes": (raw(FIRST + b"\0" + varint(2**63) + b"\1wx"), "exceeds its block", CheckpointError),
    "a value past the block": (raw(FIRST + b"\0\1\x7fwx"), "exceeds its block", CheckpointError),
    "an entry truncated": (raw(FIRST + b"\0\1"), "exceeds its block", CheckpointError),
    "more restarts than bytes": (raw(FIRST, 2**32 - 1), "whose size differs from its entries", CheckpointError),
    "a block without its end": (table(b"\0"), "refers to bytes outside of the file", CheckpointError),
    "compressed": (table(block([header()]), kind=1), "has compressed blocks", CheckpointError),
    "a block past the end": (table(handles=[varint(200) + varint(1)]), "refers to bytes outside", CheckpointError),
    "a block far past the end": (
        table(handles=[varint(2**63) + varint(1)]),
        "refers to bytes outside",
        CheckpointError,
    ),
    "a block of 2^40 bytes": (table(handles=[varint(0) + varint(2**40)]), "exceed the file", CheckpointError),
    "no place of a block": (table(handles=[b"\x80"]), "refers to bytes outside", CheckpointError),
    "a block again and again": (
        table(bytes(400) + (100).to_bytes(4, "little"), handles=[varint(0) + varint(404)] * 1000),
        "blocks that overlap",
        CheckpointError,
    ),
    "a number of 11 bytes": (of((b"w", b"\x08" + b"\xff" * 10 + b"\1")), "more than 64 bits", CheckpointError),
    "a number truncated": (of((b"w", b"\x08\x80")), "refers to bytes outside of the file", CheckpointError),
    "a group": (of((b"w", b"\x0b\x0c")), "not a protocol buffer of TensorFlow", CheckpointError),
    "a field past its message": (of((b"w", b"\x12\x7f")), "refers to bytes outside of the file", CheckpointError),
    "a type twice": (of((b"w", field(1, 1) + entry()[1])), "field 1 is not one number", CheckpointError),
    "a shape twice": (of((b"w", field(2, b"") + entry()[1])), "field 2 is not one message", CheckpointError),
    "a type that is a message": (of((b"w", field(1, b""))), "field 1 is not one number", CheckpointError),
    "a shape that is a number": (of((b"w", field(1, 1) + field(2, 1))), "field 2 is not one message", CheckpointError),
    "larger than any": (bytes(2**20) + MAGIC, "1048584 bytes; the index of a GPT-2 has", CheckpointError),
    "the end alone": (MAGIC, "8 bytes; the index of a GPT-2 has", CheckpointError),
    "zeros": (bytes(40) + MAGIC, "the block at 0 does not match its checksum", CheckpointError),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("index", "message", "error"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_index_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], index: bytes, message: str, error: type[BridgeError]
) -> None:
    assert_refused(written(tmp_path / "damaged", index, bytes(8)), message, capsys, error)


def test_the_unedited_tables_of_these_tests_are_valid(tmp_path: Path) -> None:
    for index in (of(entry(crc=masked_crc32c(bytes(8)))), table(block([header()]), block([entry()]))):
        assert list(read_bundle(written(tmp_path / "d", index, bytes(8)) / "m.index")) == ["w"]
    assert list(read_bundle(written(tmp_path / "d", raw(FIRST, 0), b"") / "m.index")) == []


def test_a_change_anywhere_in_a_block_is_refused(tmp_path: Path) -> None:
    entries = block([header(), entry(crc=masked_crc32c(bytes(8)))])
    index = table(entries)
    directory = written(tmp_path / "damaged", index, bytes(8))
    metaindex = range(len(entries) + 5, len(entries) + 5 + 4 + 5)  # empty, and not read
    for at in {*range(len(index) - 48)} - {*metaindex}:
        changed = bytearray(index)
        changed[at] ^= 0x10
        (directory / "m.index").write_bytes(changed)
        with pytest.raises(CheckpointError, match="does not match its checksum"):
            read_bundle(directory / "m.index")

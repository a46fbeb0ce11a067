"""The GGUF container against the gguf package (0.19.0), and against hostile files."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from support.gguf_bytes import (
    Pairs,
    array,
    described,
    file_of,
    gguf_tensors,
    gpt2,
    gpt2_pairs,
    int32s,
    laid_out,
    number,
    sized,
    text,
    texts,
)
from support.refusals import MOST_SECONDS, assert_refused

from bridge import CheckpointError
from bridge.containers.gguf import _TENSOR_TYPES, Array, GGUFFile, is_gguf, write_file
from bridge.containers.gguf import float32 as float32_value
from bridge.containers.gguf import int32s as int32s_value
from bridge.containers.gguf import string as string_value
from bridge.containers.gguf import strings as strings_value
from bridge.containers.gguf import uint32 as uint32_value
from bridge.storage.tensors import LazyTensor, LazyTensorMap

DTYPES = {
    np.dtype(np.float32): gguf.GGMLQuantizationType.F32,
    np.dtype(np.float16): gguf.GGMLQuantizationType.F16,
    np.dtype(ml_dtypes.bfloat16): gguf.GGMLQuantizationType.BF16,
}


def samples() -> dict[str, np.ndarray]:
    """Return tensors of random bytes in every type and rank. Some sizes need padding, others do not."""
    rng = np.random.default_rng(0)
    return {
        f"{dtype} {shape}": rng.integers(0, 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
        .view(dtype)
        .reshape(shape)
        for dtype in DTYPES
        for shape in ((3, 5), (7,), (16,), (2, 3, 4), (2, 1, 3, 5))
    }


def assert_same(found: Any, expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape), name
        assert found[name].tobytes() == values.tobytes(), name


# Against the package


@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_files_of_the_package_are_read(tmp_path: Path, alignment: int) -> None:
    writer = gguf.GGUFWriter(tmp_path / "f", "gpt2")
    writer.add_custom_alignment(alignment)
    writer.add_uint8("a.uint8", 200)
    writer.add_int8("a.int8", -100)
    writer.add_uint16("a.uint16", 60_000)
    writer.add_int16("a.int16", -30_000)
    writer.add_int32("a.int32", -(2**31))
    writer.add_uint64("a.uint64", 2**64 - 1)
    writer.add_int64("a.int64", -(2**63))
    writer.add_float32("a.float32", 0.1)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "naïve 日本")
    writer.add_array("a.strings", ["", "é", "three"])
    writer.add_array("a.ints", [3, -1, 2])
    writer.add_array("a.floats", [0.5, -2.0])
    for name, values in samples().items():
        writer.add_tensor(name, values.view(np.uint8), raw_dtype=DTYPES[values.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = GGUFFile.open(tmp_path / "f")
    found = {key: value for key, value in file.metadata.items() if not isinstance(value, Array)}
    assert found == {
        "general.architecture": b"gpt2",
        "general.alignment": alignment,
        "a.uint8": 200,
        "a.int8": -100,
        "a.uint16": 60_000,
        "a.int16": -30_000,
        "a.int32": -(2**31),
        "a.uint64": 2**64 - 1,
        "a.int64": -(2**63),
        "a.float32": float(np.float32(0.1)),
        "a.float64": 0.1,
        "a.bool": True,
        "a.string": "naïve 日本".encode(),
    }
    assert found["a.bool"] is True
    arrays = {key: value.read() for key, value in file.metadata.items() if isinstance(value, Array)}
    assert arrays == {"a.strings": [b"", "é".encode(), b"three"], "a.ints": [3, -1, 2], "a.floats": [0.5, -2.0]}
    assert_same(file.tensors(), samples())


def test_the_package_reads_written_files(tmp_path: Path) -> None:
    metadata = {
        "general.architecture": string_value("gpt2"),
        "a.uint32": uint32_value(2**32 - 1),
        "a.float32": float32_value(1e-5),
        "a.string": string_value("naïve"),
        "a.strings": strings_value(["", "é", "three"]),
        "a.ints": int32s_value([3, -1]),
    }
    write_file(tmp_path / "f", metadata, LazyTensorMap.of(samples()))
    reader = gguf.GGUFReader(tmp_path / "f")
    contents = {name: field.contents() for name, field in reader.fields.items()}
    assert contents == {
        "GGUF.version": 3,
        "GGUF.tensor_count": len(samples()),
        "GGUF.kv_count": 6,
        "general.architecture": "gpt2",
        "a.uint32": 2**32 - 1,
        "a.float32": float(np.float32(1e-5)),
        "a.string": "naïve",
        "a.strings": ["", "é", "three"],
        "a.ints": [3, -1],
    }
    assert [tensor.name for tensor in reader.tensors] == list(samples())
    for tensor in reader.tensors:
        values = samples()[tensor.name]
        assert tensor.tensor_type == DTYPES[values.dtype]
        assert tuple(tensor.shape[::-1]) == values.shape
        assert tensor.data_offset % 32 == 0
        assert tensor.data.tobytes() == values.tobytes()
    assert (tmp_path / "f").stat().st_size % 32 == 0


def test_written_files_are_read_back(tmp_path: Path) -> None:
    write_file(tmp_path / "f", {"a.strings": strings_value(["x", "yz"])}, LazyTensorMap.of(samples()))
    file = GGUFFile.open(tmp_path / "f")
    assert_same(file.tensors(), samples())
    assert is_gguf(tmp_path / "f")


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_file(tmp_path / name, {}, LazyTensorMap.of(samples()))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_views_are_written_in_their_order(tmp_path: Path) -> None:
    base = np.arange(48, dtype=np.float32).reshape(6, 8)
    views = {"transposed": base.T, "strided": base[::2, 1::3], "reversed": base[::-1]}
    write_file(tmp_path / "f", {}, LazyTensorMap.of(views))
    assert_same(GGUFFile.open(tmp_path / "f").tensors(), views)


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.complex64])
def test_an_unsupported_dtype_is_refused_before_anything_is_written(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(CheckpointError, match=r"'odd': GGUF cannot hold"):
        write_file(tmp_path / "f", {}, LazyTensorMap.of({"odd": np.zeros(3, dtype)}))
    assert list(tmp_path.iterdir()) == []


def test_a_file_beyond_the_limits_for_reading_is_not_written(tmp_path: Path) -> None:
    tensors = LazyTensorMap.of(dict.fromkeys(map(str, range(20_000)), np.zeros(1, np.float32)))
    with pytest.raises(CheckpointError, match="20000 tensors and a header of"):
        write_file(tmp_path / "f", {}, tensors)
    with pytest.raises(CheckpointError, match="exceed the limits for reading"):
        write_file(tmp_path / "f", {"a.string": string_value("x" * 2**24)}, LazyTensorMap({}))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("mine")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "f", {}, LazyTensorMap({}))
    assert (tmp_path / "f").read_text() == "mine"


def test_a_tensor_that_changes_while_it_is_written_is_an_error(tmp_path: Path) -> None:
    entry = LazyTensor(np.dtype(np.float32), (3,), lambda: np.zeros(4, np.float32))
    with pytest.raises(CheckpointError, match="'w' changed"):
        write_file(tmp_path / "f", {}, LazyTensorMap({"w": entry}))


def test_type_names_in_messages_are_those_of_the_package() -> None:
    theirs = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    assert theirs == {number: name for number, name in enumerate(_TENSOR_TYPES) if name != "-"}


# Hostile and damaged files. Each is a complete GPT-2 with one fault.

V3 = b"GGUF" + struct.pack("<I", 3)
HUGE = 2**60


def with_pair(key: str | bytes, value: bytes) -> bytes:
    encoded = key.encode() if isinstance(key, str) else key
    return gpt2([*gpt2_pairs(), (encoded, value)])


def with_first(description: bytes, data: bytes = b"") -> bytes:
    """Return a file in which the first tensor has this description, and its data starts with `data`."""
    descriptions, rest = laid_out(gguf_tensors())
    return file_of(gpt2_pairs(), [description, *descriptions[1:]], data + rest)


def moved(name: str, by: int) -> bytes:
    """Return a file in which the offset of one tensor is wrong by this many bytes."""
    descriptions, data = laid_out(gguf_tensors())
    at = next(i for i, d in enumerate(descriptions) if name.encode() in d)
    offset = int.from_bytes(descriptions[at][-8:], "little") + by
    descriptions[at] = descriptions[at][:-8] + struct.pack("<Q", offset)
    return file_of(gpt2_pairs(), descriptions, data)


def swapped() -> bytes:
    """Return a file whose last two descriptions are exchanged, but not their data."""
    descriptions, data = laid_out(gguf_tensors())
    return file_of(gpt2_pairs(), [*descriptions[:-2], descriptions[-1], descriptions[-2]], data)


def aligned_to(alignment: bytes) -> bytes:
    return gpt2([*gpt2_pairs(), (b"general.alignment", alignment)])


def twice(pairs: Pairs) -> Pairs:
    return [*pairs, pairs[1]]


NESTED = struct.pack("<IQ", 9, 1)
NOT_NEXT = "of the data instead of"
EMBEDDING = ("token_embd.weight", (8, 11))
GOOD = gpt2()
LATER = "convert the original model again"

# The content of the file, and a part of the error message.
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "3 bytes of the magic": (b"GGU", "its first bytes match no supported format"),
    "another magic": (b"GGML" + GOOD[4:], "its first bytes match no supported format"),
    "the magic backwards": (b"FUGG" + GOOD[4:], "its first bytes match no supported format"),
    "all zeros": (bytes(len(GOOD)), "its first bytes match no supported format"),
    "the magic alone": (b"GGUF", "the header: '4' bytes from 4 exceed the file's 4"),
    "zeros after the magic": (b"GGUF" + bytes(len(GOOD) - 4), "GGUF version 0; only versions 2 and 3 are supported"),
    "truncated in the counts": (GOOD[:20], "exceed the file's 20; it is damaged or truncated"),
    "truncated in the keys": (GOOD[:100], "it is damaged or truncated"),
    "truncated in the descriptions": (GOOD[:500], "tensor 4 of 28: '20' bytes from 481"),
    "truncated in the data": (GOOD[:-100], "is damaged or truncated"),
    "one byte less than its data": (gpt2(tensors={**gguf_tensors(), "z": np.ones(8, "f")})[:-1], "truncated"),
    "one byte more": (GOOD + b"\0", "1 bytes after the last tensor"),
    "more padding than the alignment": (GOOD + bytes(32), "32 bytes after the last tensor"),
    "data without tensors": (file_of(gpt2_pairs(), [], bytes(64)), "64 bytes after the last tensor"),
    # The header
    "version 1": (gpt2(start=b"GGUF\1\0\0\0"), LATER),
    "version 4": (gpt2(start=b"GGUF\4\0\0\0"), "GGUF version 4; only versions 2 and 3 are supported"),
    "version 2^32-1": (gpt2(start=b"GGUF\xff\xff\xff\xff"), "GGUF version 4294967295"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 33, 7) + GOOD[24:], "is big-endian; convert it with gguf-convert"),
    "2^60 tensors": (gpt2(tensor_count=HUGE), f"declares {HUGE} tensors; the limit is 16384"),
    "2^64-1 tensors": (gpt2(tensor_count=2**64 - 1), "declares 18446744073709551615 tensors"),
    "2^60 keys": (gpt2(key_count=HUGE), f"declares {HUGE} keys; the limit is 4096"),
    "one key more than the file has": (gpt2(key_count=8), "bytes from 341 exceed"),
    "one key less": (gpt2(key_count=6), "tensor 'gpt2.attention.layer_norm_epsilon': has 6 dimensions"),
    "one tensor more than the file has": (gpt2(tensor_count=29), "tensor '': has 0 dimensions"),
    "one tensor less": (gpt2(tensor_count=27), "bytes after the last tensor"),
    # Keys
    "key of 2^60 bytes": (gpt2(gpt2_pairs(), start=V3) [:24] + sized("", HUGE), f"'{HUGE}' bytes from 32 exceed"),
    "key of 2^64-1 bytes": (GOOD[:24] + sized("", 2**64 - 1), "exceed the file's"),
    "key of 65536 bytes": (with_pair("a" * 65_536, number(1)), "a name of 65536 bytes; the limit is 65535"),
    "empty key": (with_pair("", number(1)), "'' is not an ASCII name"),
    "key not ASCII": (with_pair("é", number(1)), "is not an ASCII name"),
    "key not UTF-8": (with_pair(b"\xff\xfe", number(1)), "is not an ASCII name"),
    "key with control characters": (with_pair("\x1b[31m\n", b"\x63\0\0\0"), r"'\x1b[31m\n': has a value of the"),
    "duplicate key": (gpt2(twice(gpt2_pairs())), "'gpt2.context_length': appears twice"),
    # Values
    "value of type 13": (with_pair("a.b", struct.pack("<II", 13, 0)), "'a.b': has a value of the unknown type 13"),
    "value of type 2^32-1": (with_pair("a.b", b"\xff" * 8), "has a value of the unknown type 4294967295"),
    "value missing": (file_of([*gpt2_pairs(), (b"a.b", b"\4")], alignment=1), "'a.b': '4' bytes from"),
    "string of 2^60 bytes": (with_pair("a.b", text("x", HUGE)), f"'a.b': '{HUGE}' bytes from"),
    "string of 2^64-1 bytes": (with_pair("a.b", text("x", 2**64 - 1)), "exceed the file's"),
    "bool of 7": (with_pair("a.b", number(7, "bool")), "'a.b': is a bool with the value 7"),
    "array of 2^60 numbers": (with_pair("a.b", array(b"", 5, HUGE)), f"'a.b': '{4 * HUGE}' bytes from"),
    "array of 2^64-1 bytes": (with_pair("a.b", array(b"", 0, 2**64 - 1)), "exceed the file's"),
    "array of 2^60 strings": (with_pair("a.b", array(b"", 8, HUGE)), f"'a.b': '{8 * HUGE}' bytes from"),
    "array with a string too long": (with_pair("a.b", array(sized("a") + sized("", HUGE), 8, 2)), f"'{HUGE}' bytes"),
    "array of too many strings": (with_pair("a.b", texts([b""] * (2**19 + 1))), "have 524289 strings"),
    "arrays of strings, too many": (
        gpt2([*gpt2_pairs(), (b"a.b", texts(["x"])), (b"a.c", texts([b""] * 2**19))]),
        "'a.c': arrays up to here have 524289 strings; the limit is 524288",
    ),
    "array of arrays": (with_pair("a.b", array(int32s([1]), 9, 1)), "is an array of type 9; only arrays of"),
    "arrays nested 100,000 deep": (with_pair("a.b", array(NESTED * 100_000, 9, 1)), "of type 9"),
    "array of type 99": (with_pair("a.b", array(b"", 99, 0)), "is an array of type 99"),
    "header beyond the limit": (with_pair("a.b", text("x" * 2**24)), "larger than the limit of 16777216 bytes"),
    # Alignment
    "alignment 0": (aligned_to(number(0)), "general.alignment is '0', not a power of two of at least 8"),
    "alignment 3": (aligned_to(number(3)), "general.alignment is '3'"),
    "alignment 4": (aligned_to(number(4)), "general.alignment is '4'"),
    "alignment 48": (aligned_to(number(48)), "general.alignment is '48'"),
    "alignment 2^31": (aligned_to(number(2**31)), NOT_NEXT),
    "alignment -32": (aligned_to(number(-32, "int32")), "general.alignment is '-32'"),
    "alignment a float": (aligned_to(number(32.0, "float32")), "general.alignment is '32.0'"),
    "alignment a bool": (aligned_to(number(1, "bool")), "general.alignment is 'True'"),
    "alignment a string": (aligned_to(text("32")), "general.alignment is '32'"),
    "alignment an array": (aligned_to(int32s([32])), "general.alignment is an array of 1"),
    "alignment that is not the file's": (aligned_to(number(64)), NOT_NEXT),
    # Tensors
    "name of 2^60 bytes": (with_first(sized("", HUGE)), f"tensor 1 of 28: '{HUGE}' bytes from"),
    "name of 64 bytes": (with_first(described("x" * 64, (8, 11))), "a name of 64 bytes; the limit is 63"),
    "name not UTF-8": (with_first(described(b"\xff\x1b", (8, 11))), "tensor 1 of 28: its name"),
    "name with control characters": (with_first(described("\x1b[31m", (8, 11), 32)), r"tensor '\x1b[31m': starts at"),
    "duplicate name": (with_first(described("position_embd.weight", (8, 11))), "'position_embd.weight': appears twice"),
    "no dimensions": (with_first(described("token_embd.weight", ())), "has 0 dimensions, not 1 to 4"),
    "5 dimensions": (with_first(described("token_embd.weight", (8, 11, 1, 1, 1))), "has 5 dimensions"),
    "2^32-1 dimensions": (with_first(described(*EMBEDDING, rank=2**32 - 1)), "has 4294967295 dimensions"),
    "a dimension of 0": (with_first(described("token_embd.weight", (0, 11))), "': starts at byte 352"),
    "dimensions that overflow to 0": (with_first(described("token_embd.weight", (2**32, 2**32))), NOT_NEXT),
    "a dimension of 2^64-1": (with_first(described("token_embd.weight", (2**64 - 1, 1))), NOT_NEXT),
    "one dimension more than described": (with_first(described("token_embd.weight", (8, 12))), NOT_NEXT),
    "offset of 2^64-1": (with_first(described(*EMBEDDING, offset=2**64 - 1)), "starts at byte 18446744073709551615"),
    "offset not aligned": (moved("output_norm.bias", 4), "tensor 'output_norm.bias': starts at byte"),
    "overlapping": (moved("position_embd.weight", -32), "'position_embd.weight': starts at byte 320"),
    "a hole": (moved("position_embd.weight", 32), "starts at byte 384 of the data instead of '352'"),
    "past the end": (moved("output_norm.bias", 2**40), "tensor 'output_norm.bias': starts at byte"),
    "in another order than the data": (swapped(), NOT_NEXT),
    "Q4_0": (with_first(described(*EMBEDDING, type=2)), "'token_embd.weight': has the quantised type Q4_0"),
    "Q6_K": (with_first(described(*EMBEDDING, type=14)), "has the quantised type Q6_K"),
    "F64": (with_first(described(*EMBEDDING, type=28)), "holds F64; supported types are F32, F16, BF16"),
    "I32": (with_first(described(*EMBEDDING, type=26)), "holds I32; supported types are F32, F16, BF16"),
    "a removed type": (with_first(described(*EMBEDDING, type=4)), "holds ggml's type 4; supported types are"),
    "type 2^32-1": (with_first(described(*EMBEDDING, type=2**32 - 1)), "holds ggml's type 4294967295"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    (tmp_path / "damaged.gguf").write_bytes(content)
    assert_refused(tmp_path / "damaged.gguf", message, capsys, CheckpointError)


def test_the_unedited_file_of_these_tests_is_valid(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(GOOD)
    assert_same(GGUFFile.open(tmp_path / "f").tensors(), gguf_tensors())


def test_version_2_is_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(gpt2(start=b"GGUF\2\0\0\0"))
    assert_same(GGUFFile.open(tmp_path / "f").tensors(), gguf_tensors())


def test_the_last_tensor_need_not_be_padded(tmp_path: Path) -> None:
    tensors = {**gguf_tensors(), "last": np.ones(3, np.float32)}
    whole = gpt2(tensors=tensors)
    for missing in (1, 19, 20):
        (tmp_path / f"{missing}").write_bytes(whole[:-missing])
        assert_same(GGUFFile.open(tmp_path / f"{missing}").tensors(), tensors)
    (tmp_path / "less").write_bytes(whole[:-21])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        GGUFFile.open(tmp_path / "less").tensors()


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    for length in [*range(0, len(GOOD) - 32, 7), *range(2_000)]:
        (tmp_path / "f").write_bytes(GOOD[:length])
        with pytest.raises(CheckpointError):
            GGUFFile.open(tmp_path / "f").tensors()


def test_a_file_without_tensors_or_keys_is_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(file_of([]))
    assert GGUFFile.open(tmp_path / "f").metadata == {}
    assert dict(GGUFFile.open(tmp_path / "f").tensors()) == {}


def test_strings_that_are_not_utf8_are_kept_unchanged(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(file_of([(b"a.b", text(b"\xff")), (b"a.c", texts([b"\xfe", b""]))]))
    metadata = GGUFFile.open(tmp_path / "f").metadata
    assert metadata["a.b"] == b"\xff"
    assert isinstance(metadata["a.c"], Array)
    assert metadata["a.c"].read() == [b"\xfe", b""]


def test_a_vocabulary_of_gpt2s_size_is_skipped_quickly(tmp_path: Path) -> None:
    tokens = texts([f"token {i}" for i in range(50_257)])
    merges = texts([f"tok {i}" for i in range(50_000)])
    (tmp_path / "f").write_bytes(file_of([(b"a.tokens", tokens), (b"a.merges", merges)]))
    began = time.process_time()
    metadata = GGUFFile.open(tmp_path / "f").metadata
    assert time.process_time() - began < MOST_SECONDS
    tracemalloc.start()
    try:
        GGUFFile.open(tmp_path / "f")
        assert tracemalloc.get_traced_memory()[1] < 2**20, "the strings stay in the file"
    finally:
        tracemalloc.stop()
    assert isinstance(metadata["a.tokens"], Array)
    assert metadata["a.tokens"].read()[50_256] == b"token 50256"


def test_opening_does_not_read_the_data(tmp_path: Path) -> None:
    """The file is sparse, with 1 TiB of data: only its header is read, and no memory is allocated for the data."""
    path = tmp_path / "f"
    path.write_bytes(file_of([], [described("w", (2**38,))]))
    os.truncate(path, path.stat().st_size + 2**40)
    assert GGUFFile.open(path).tensors().entries["w"].nbytes == 2**40


def test_a_file_that_changed_after_opening_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(GOOD)
    file = GGUFFile.open(tmp_path / "f")
    tensors = file.tensors()
    os.truncate(tmp_path / "f", len(GOOD) - 1)
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        tensors["output_norm.bias"]
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        file.tensors()

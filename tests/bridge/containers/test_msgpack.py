"""Flax's msgpack container against `flax.serialization` 0.12.8, and against hostile files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
from support.models import SMALLEST
from support.refusals import assert_refused
from support.tensors import assert_same_tensors

import bridge.containers.msgpack
from bridge import CheckpointError
from bridge.containers.msgpack import is_msgpack, read_file, write_file
from bridge.storage.dtypes import DTYPES
from bridge.storage.tensors import LazyTensor, LazyTensorMap

SHAPES = [(3, 5, 2), (7,), (), (0,), (3, 0, 2), (40, 9), (300, 70)]
"""From a few bytes to more than 2^16, so that length fields of every width occur."""


def samples(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Return one array of random bytes for every dtype, NaN payloads included, in maps of different depths."""
    rng = np.random.default_rng(0)
    arrays = {}
    for number, (name, dtype) in enumerate(DTYPES.items()):
        raw = rng.integers(0, 2 if name == "bool" else 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
        arrays["/".join(["m"] * (number % 3) + [f"{name} é"])] = raw.view(dtype).reshape(shape)
    return arrays


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    write_file(path, LazyTensorMap.of(arrays))
    return path


def nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.unflatten_dict(arrays, sep="/")


def read(path: Path) -> LazyTensorMap:
    return LazyTensorMap(read_file(path))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Flax and this project split arrays into chunks from 100 bytes instead of 2^30."""
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 100)
    monkeypatch.setattr(bridge.containers.msgpack, "MOST_CHUNK_BYTES", 100)


# Against flax


def test_the_chunk_size_is_that_of_flax() -> None:
    assert bridge.containers.msgpack.MOST_CHUNK_BYTES == flax.serialization.MAX_CHUNK_SIZE


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_files_of_flax_are_read_and_written_again_with_the_same_bytes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    theirs = flax.serialization.to_bytes(nested(samples(shape)))
    (tmp_path / "theirs").write_bytes(theirs)
    assert_same_tensors(read(tmp_path / "theirs"), samples(shape))
    assert write(tmp_path / "ours", samples(shape)).read_bytes() == theirs


@pytest.mark.parametrize("shape", [(3, 5, 2), (26,), (40, 9), (1, 101)], ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_chunked_arrays_are_one_array(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """There are arrays with a partial last chunk, and arrays with more than ten chunks, where "10" sorts before "2"."""
    theirs = flax.serialization.to_bytes(nested(samples(shape)))
    assert b"__msgpack_chunked_array__" in theirs
    (tmp_path / "theirs").write_bytes(theirs)
    assert_same_tensors(read(tmp_path / "theirs"), samples(shape))
    assert write(tmp_path / "ours", samples(shape)).read_bytes() == theirs
    restored = flax.serialization.msgpack_restore((tmp_path / "ours").read_bytes())
    assert_same_tensors(flax.traverse_util.flatten_dict(restored, sep="/"), samples(shape))


@pytest.mark.usefixtures("small_chunks")
def test_chunks_are_joined_by_number_in_any_order_of_the_file(tmp_path: Path) -> None:
    array = np.arange(700, dtype=np.float32)
    chunked = {"w": flax.serialization._chunk(array)}
    chunked["w"]["chunks"] = dict(sorted(chunked["w"]["chunks"].items()))
    (tmp_path / "f").write_bytes(packed(chunked))
    assert_same_tensors(read(tmp_path / "f"), {"w": array})


def test_flax_restores_written_files_into_a_model(tmp_path: Path) -> None:
    target = nested({name: np.zeros_like(array) for name, array in samples((3, 5)).items()})
    content = write(tmp_path / "f", samples((3, 5))).read_bytes()
    restored = flax.serialization.from_bytes(target, content)
    assert_same_tensors(flax.traverse_util.flatten_dict(restored, sep="/"), samples((3, 5)))


def test_jax_arrays_and_numpy_scalars_written_by_flax_are_read(tmp_path: Path) -> None:
    tree = {"jax": jnp.ones((3, 2), jnp.bfloat16), "scalar": np.float32(2.5), "order": np.asfortranarray(np.eye(3, 2))}
    (tmp_path / "f").write_bytes(flax.serialization.msgpack_serialize(tree))
    assert_same_tensors(read(tmp_path / "f"), {name: np.asarray(leaf) for name, leaf in tree.items()})


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("chunks", [False, True], ids=["whole", "chunked"])
def test_arrays_that_are_not_contiguous_are_written_correctly(
    tmp_path: Path, dtype: type, chunks: bool, request: pytest.FixtureRequest
) -> None:
    if chunks:
        request.getfixturevalue("small_chunks")
    base = np.arange(2 * 6 * 8).reshape(2, 6, 8).astype(dtype)
    arrays = {
        "transposed": base[0].T,
        "permuted": base.transpose(1, 2, 0),
        "strided": base[:, ::2, 1::3],
        "reversed": base[::-1, :, ::-1],
        "broadcast": np.broadcast_to(base[0, 0], (5, 8)),
    }
    path = write(tmp_path / "f", arrays)
    assert_same_tensors(flax.serialization.msgpack_restore(path.read_bytes()), arrays)
    assert_same_tensors(read(path), arrays)


@pytest.mark.parametrize("dtype", [np.complex64, ">f4", ml_dtypes.float8_e4m3fn, "U3"])
def test_an_unsupported_dtype_is_refused_before_anything_is_written(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(CheckpointError, match=r"'odd': Flax's msgpack files cannot hold "):
        write(tmp_path / "f", {"odd": np.zeros(3, dtype)})
    assert list(tmp_path.iterdir()) == []


def test_a_tree_beyond_the_limits_for_reading_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="20000 tensors exceed the limit for reading"):
        write(tmp_path / "f", dict.fromkeys(map(str, range(20_000)), np.zeros(1, np.float32)))
    assert list(tmp_path.iterdir()) == []
    most = dict.fromkeys((f"{i}/w" for i in range(2**14)), np.zeros(1, np.int8))
    with pytest.raises(CheckpointError, match="more than 32768 values"):
        read_file(write(tmp_path / "f", most))


@pytest.mark.parametrize("chunks", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("size", [49, 51])
def test_a_tensor_that_changes_while_it_is_written_is_an_error(
    tmp_path: Path, chunks: bool, size: int, request: pytest.FixtureRequest
) -> None:
    if chunks:
        request.getfixturevalue("small_chunks")
    entry = LazyTensor(np.dtype(np.float32), (50,), lambda: np.zeros(size, np.float32))
    with pytest.raises(CheckpointError, match="'m/w' changed"):
        write_file(tmp_path / "f", LazyTensorMap({"m/w": entry}))


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("mine")
    with pytest.raises(FileExistsError):
        write(tmp_path / "f", samples((2,)))
    assert (tmp_path / "f").read_text() == "mine"


@pytest.mark.usefixtures("small_chunks")
def test_arrays_are_writeable_and_aligned_for_jax(tmp_path: Path) -> None:
    for array in read(write(tmp_path / "f", samples((3, 5)))).values():
        assert array.flags.writeable and array.flags.c_contiguous
        assert array.ctypes.data % 64 == 0


@pytest.mark.parametrize("size", [10, 1000], ids=["whole", "chunked"])
@pytest.mark.usefixtures("small_chunks")
def test_a_file_that_shrinks_after_opening_is_an_error_on_read(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "f", {"a": np.ones(size, np.float32)})
    tensors = read(path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        tensors["a"]


# Hostile and damaged files


class Twice(dict):
    """A map that is packed with several values under one name."""

    def __init__(self, name: Any, values: list[Any]) -> None:
        super().__init__(enumerate(values))
        self.pairs = [(name, value) for value in values]

    def items(self) -> Any:
        return self.pairs


def packed(tree: Any) -> bytes:
    """Pack the tree with the msgpack package. Arrays and other leaves are encoded as Flax encodes them."""
    return msgpack.packb(tree, default=flax.serialization._msgpack_ext_pack, strict_types=False)


def array(shape: Any = (2,), dtype: Any = "float32", data: Any = bytes(8), code: int = 1) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, data)))


def raw(payload: bytes) -> msgpack.ExtType:
    return msgpack.ExtType(1, payload)


def tree_of(leaf: Any) -> bytes:
    return packed({"w": leaf})


def chunked(shape: Any = None, chunks: Any = None, mark: Any = True, **more: Any) -> bytes:
    half = array((2,))
    shape = {"0": 2, "1": 2} if shape is None else shape
    return tree_of(
        {"__msgpack_chunked_array__": mark, "shape": shape, "chunks": chunks or {"0": half, "1": half}, **more}
    )


GOOD = array()
HALF = array((2,))
CUT = "exceed the file's"

# The content of the file, and a part of the error message.
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "1 bytes from 0 exceed the file's 0"),
    "all zeros": (bytes(1000), "not a tree of parameters"),
    "a number": (packed(5), "not a tree of parameters"),
    "an array alone": (packed(GOOD), "not a tree of parameters"),
    "nil": (packed(None), "this is nil, not an array"),
    "a list": (packed([{"w": GOOD}]), "this is a list, not an array"),
    "no msgpack type": (b"\xc1", "an invalid value"),
    "JSON": (json.dumps({"w": 1}).encode(), "not a tree of parameters"),
    "map of 2^32-1 without entries": (b"\xdf\xff\xff\xff\xff", CUT),
    "map of 2^32-1 zeros": (
        b"\xdf\xff\xff\xff\xff" + bytes(1000),
        "a name in this map is a whole number, not a string",
    ),
    "map with a missing entry": (b"\x82" + tree_of(GOOD)[1:], CUT),
    "list of 2^32-1": (b"\x81\xa1w\xdd\xff\xff\xff\xff", "'w': this is a list, not an array"),
    "head truncated": (b"\xdf\xff", CUT),
    "name past the end": (b"\x81\xdb\xff\xff\xff\xff", "a name in this map has 4294967295 bytes; the limit is 256"),
    "name truncated": (b"\x81\xa5ab", CUT),
    "name of 257 bytes": (packed({"w" * 257: GOOD}), "a name in this map has 257 bytes"),
    "name not UTF-8": (b"\x81\xa1\xff" + packed(GOOD), "a name in this map is not UTF-8"),
    "name of bytes": (packed({b"w": GOOD}), "a name in this map is bytes, not a string"),
    "name a number": (packed({0: GOOD}), "a name in this map is a whole number"),
    "name a float": (packed({0.5: GOOD}), "a name in this map is a float"),
    "name nil": (packed({None: GOOD}), "a name in this map is nil"),
    "name a bool": (packed({True: GOOD}), "a name in this map is a bool"),
    "name an array": (b"\x81" + packed(GOOD) + packed(GOOD), "a name in this map is an extension"),
    "name empty": (packed({"": GOOD}), "'' is not a valid name of"),
    "name with a slash": (packed({"a/w": GOOD, "a": {"w": GOOD}}), "'a/w' is not a valid name of"),
    "name with control characters": (packed({"\x1b[31m\n": 1.5}), r"'\x1b[31m\n': this is a float"),
    "name twice": (packed(Twice("w", [GOOD, GOOD])), "'w' appears twice"),
    "map and array of one name": (packed(Twice("w", [GOOD, {"w": GOOD}])), "'w' appears twice"),
    "name twice in two encodings": (b"\x82\xa1w" + packed(GOOD) + b"\xd9\x01w" + packed(GOOD), "'w' appears twice"),
    "depth 17": (b"\x81\xa1w" * 17 + packed(GOOD), "nested more than 16 deep"),
    "depth 2,000": (b"\x81\xa1w" * 2_000 + packed(GOOD), "nested more than 16 deep"),
    "depth 1,000,000": (b"\x81\xa1w" * 1_000_000, "nested more than 16 deep"),
    "lists 100,000 deep": (b"\x81\xa1w" + b"\x91" * 100_000, "'w': this is a list"),
    "40,000 empty maps": (packed({str(i): {} for i in range(40_000)}), "more than 32768 values"),
    "trailing byte": (tree_of(GOOD) + b"\0", "1 bytes after the end of the tree"),
    "a second tree": (tree_of(GOOD) * 2, "bytes after the end of the tree"),
    "leaf a number": (tree_of(5), "'w' is the number 5, not an array"),
    "leaf a bool": (tree_of(True), "'w' is the number True, not an array"),
    "leaf a negative number": (tree_of(-(2**63)), "'w' is the number -9223372036854775808"),
    "leaf a float": (tree_of(0.5), "'w': this is a float"),
    "leaf nil": (tree_of(None), "'w': this is nil"),
    "leaf a text": (tree_of("weights"), "'w': this is a string"),
    "leaf bytes": (tree_of(bytes(8)), "'w': this is bytes"),
    "leaf a list of arrays": (tree_of([GOOD]), "'w': this is a list"),
    "leaf a complex number": (tree_of(1 + 2j), "'w': this is a complex number"),
    "leaf a time": (tree_of(msgpack.Timestamp(1, 2)), "'w': this is a time"),
    "unknown extension": (tree_of(msgpack.ExtType(4, bytes(8))), "'w': this is of extension type 4"),
    "extension of a negative type": (tree_of(array(code=127)).replace(b"\x7f", b"\x80"), "of extension type -128"),
    "extension past the end": (b"\x81\xa1w\xc9\xff\xff\xff\xff\x01\x93", CUT),
    "extension without bytes": (tree_of(raw(b"")), CUT),
    "extension too short for its array": (tree_of(raw(GOOD.data[:-4])), CUT),
    "extension shorter than its array": (
        b"\x82\xa1w\xc7" + bytes([len(GOOD.data) - 1, 1]) + GOOD.data + b"\xa1x" + packed(GOOD),
        "'w': the array ends at byte",
    ),
    "extension longer than its array": (tree_of(raw(GOOD.data + b"\0")), "'w': the array ends at byte"),
    "array a map": (tree_of(raw(packed({"shape": [2]}))), "an array's content is a map, not a list"),
    "array an array": (tree_of(raw(packed(GOOD))), "an array's content is an extension, not a list"),
    "array of two parts": (tree_of(raw(packed(((2,), "float32")))), "an array of 2 parts"),
    "array of four parts": (tree_of(raw(packed(((2,), "float32", bytes(8), 0)))), "an array of 4 parts"),
    "array of 2^32-1 parts": (tree_of(raw(b"\xdd\xff\xff\xff\xff")), "an array of 4294967295 parts"),
    "shape a number": (tree_of(array(2)), "its shape is a whole number, not a list"),
    "shape nil": (tree_of(array(None)), "its shape is nil, not a list"),
    "shape a map": (tree_of(array({"0": 2})), "its shape is a map, not a list"),
    "rank 10,000": (tree_of(array([1] * 9_999 + [2])), "a shape with 10000 axes; the limit is 16"),
    "rank 2^32-1": (tree_of(raw(b"\x93\xdd\xff\xff\xff\xff")), "a shape with 4294967295 axes"),
    "size negative": (tree_of(array((-1,))), "shape (-1,) of float32 needs"),
    "sizes negative": (tree_of(array((-1, -2))), "shape (-1, -2) of float32 needs"),
    "size negative in 64 bits": (tree_of(array((-(2**63), 0), data=b"")), "shape (-9223372036854775808, 0)"),
    "size a float": (tree_of(array((2.0,))), "a size in its shape is a float"),
    "size a bool": (tree_of(array((True, 2))), "a size in its shape is a bool"),
    "size a text": (tree_of(array(("2",))), "a size in its shape is a string"),
    "size nil": (tree_of(array((None,))), "a size in its shape is nil"),
    "shape too small": (tree_of(array((1,))), "needs '4' bytes, but the array has 8"),
    "shape too large": (tree_of(array((3,))), "needs '12' bytes, but the array has 8"),
    "shape product overflows to 0": (tree_of(array((2**32, 2**32), data=b"")), "bytes, but the array has 0"),
    "shape product overflows to 8": (tree_of(array((2**62 + 2,))), "bytes, but the array has 8"),
    "shape product of 1,000 bits": (tree_of(array((2**63,) * 16)), "bytes, but the array has 8"),
    "data past the end": (tree_of(raw(b"\x93\x91\x02\xa7float32\xc6\xff\xff\xff\xff" + bytes(8))), CUT),
    "data a text": (tree_of(array(data="weights!")), "its data is a string, not bytes"),
    "data a list": (tree_of(array(data=[0, 0])), "its data is a list, not bytes"),
    "data nil": (tree_of(array(data=None)), "its data is nil, not bytes"),
    "data an extension": (tree_of(array(data=msgpack.ExtType(1, bytes(8)))), "its data is an extension, not bytes"),
    "dtype object": (tree_of(array((1,), "object")), "its dtype is 'object', not one of float32"),
    "dtype object by letter": (tree_of(array((1,), "O")), "its dtype is 'O'"),
    "dtype structured": (tree_of(array((1,), "f4,f4")), "its dtype is 'f4,f4'"),
    "dtype a list of fields": (tree_of(array((1,), [["a", "f4"]])), "its dtype is a list, not a string"),
    "dtype with a shape": (tree_of(array((1,), "2f4")), "its dtype is '2f4'"),
    "dtype text": (tree_of(array((1,), "str256")), "its dtype is 'str256'"),
    "dtype of no size": (tree_of(array((2**40,), "V0", b"")), "its dtype is 'V0'"),
    "dtype void, as numpy has bfloat16": (tree_of(array((4,), "void16")), "its dtype is 'void16'"),
    "dtype big-endian": (tree_of(array(dtype=">f4")), "its dtype is '>f4'"),
    "dtype a letter": (tree_of(array(dtype="f")), "its dtype is 'f'"),
    "dtype a time": (tree_of(array((1,), "datetime64")), "its dtype is 'datetime64'"),
    "dtype complex": (tree_of(array((1,), "complex64")), "its dtype is 'complex64'"),
    "dtype in 8 bits": (tree_of(array((8,), "float8_e4m3fn")), "its dtype is 'float8_e4m3fn'"),
    "dtype empty": (tree_of(array(dtype="")), "its dtype is ''"),
    "dtype nil": (tree_of(array(dtype=None)), "its dtype is nil, not a string"),
    "dtype bytes": (tree_of(array(dtype=b"float32")), "its dtype is bytes, not a string"),
    "dtype of 4 GiB": (tree_of(raw(b"\x93\x91\x02\xdb\xff\xff\xff\xff")), "its dtype has 4294967295 bytes"),
    "dtype with escape codes": (tree_of(array(dtype="\x1b[31m")), r"its dtype is '\x1b[31m'"),
    "scalar of an unknown dtype": (tree_of(array((), "object", code=3)), "its dtype is 'object'"),
    "chunk missing": (chunked(chunks={"0": HALF}), "does not fit the 2 elements"),
    "chunk too many": (chunked(chunks={"0": HALF, "1": HALF, "2": HALF}), "does not fit the 6 elements"),
    "first chunk missing": (chunked(chunks={"1": HALF, "2": HALF}), "numbered from 0"),
    "chunk with another number": (chunked(chunks={"00": HALF, "1": HALF}), "numbered from 0"),
    "chunk twice": (chunked(chunks=Twice("0", [HALF, HALF])), "'0' appears twice"),
    "chunks of two dtypes": (chunked(chunks={"0": HALF, "1": array((2,), "int32")}), "flat chunks of one dtype"),
    "chunk not flat": (chunked(chunks={"0": array((2, 1)), "1": HALF}), "flat chunks of one dtype"),
    "chunk a number": (chunked(chunks={"0": 2, "1": HALF}), "flat chunks of one dtype"),
    "chunk a map": (chunked(chunks={"0": {"w": HALF}, "1": HALF}), "flat chunks of one dtype"),
    "chunk of chunks": (
        chunked(chunks={"0": {"__msgpack_chunked_array__": True}, "1": HALF}),
        "a chunked array must have only",
    ),
    "chunks a number": (chunked(chunks=4), "numbered from 0"),
    "chunks a list": (chunked(chunks=[HALF, HALF]), "this is a list"),
    "no chunks": (tree_of({"__msgpack_chunked_array__": True, "shape": {"0": 0}}), "a chunked array must have only"),
    "no chunk": (tree_of({"__msgpack_chunked_array__": True, "shape": {"0": 0}, "chunks": {}}), "a chunked array"),
    "chunked without shape": (tree_of({"__msgpack_chunked_array__": True, "chunks": {"0": HALF}}), "a chunked array"),
    "chunked of an empty shape": (chunked(shape={}), "a chunked array must have only a shape"),
    "chunked of rank 17": (
        chunked(shape={str(i): 2 if i < 2 else 1 for i in range(17)}),
        "must have a shape of at most 16 whole numbers",
    ),
    "chunked size negative": (chunked(shape={"0": -2, "1": -2}), "must have a shape of at most 16 whole numbers"),
    "chunked size a bool": (chunked(shape={"0": True, "1": 4}), "must have a shape of at most 16 whole numbers"),
    "chunked size an array": (chunked(shape={"0": HALF, "1": 2}), "must have a shape of at most 16 whole numbers"),
    "chunked size missing": (chunked(shape={"1": 4}), "numbered from 0"),
    "chunked shape too large": (chunked(shape={"0": 2**62, "1": 2**62}), "does not fit the 4 elements"),
    "chunked mark false": (chunked(mark=False), "a chunked array must have only"),
    "chunked mark a number": (chunked(mark=1), "a chunked array must have only"),
    "chunked with another key": (chunked(more=HALF), "a chunked array must have only"),
    "the tree itself chunked": (
        packed({"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {"0": HALF}}),
        "not a tree of parameters",
    ),
    "git-LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 548105171\n",
        "git-LFS pointer, not the weights; run `git lfs pull`",
    ),
    "HTML page": (b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>", "HTML page, not weights"),
    "a pickle": (b"\x80\x02}q\x00.", "bytes after the end of the tree"),
    "a safetensors file": ((2).to_bytes(8, "little") + b"{}", "not a tree of parameters"),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("content", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    directory = tmp_path / "damaged"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(SMALLEST.to_hf()))
    (directory / "flax_model.msgpack").write_bytes(content)
    assert_refused(directory, message, capsys, CheckpointError)
    with pytest.raises(CheckpointError, match=re.escape(str(directory / "flax_model.msgpack"))):
        read_file(directory / "flax_model.msgpack")


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "f", {"a/w": np.ones(3, np.float32), "b": np.ones((2, 3), np.int8)}).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "f").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=CUT):
            read_file(tmp_path / "f")


def test_the_unedited_arrays_of_these_tests_are_valid(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(packed({"w": GOOD, "empty": array((0, 3), data=b""), "none": {}}))
    assert {name: entry.shape for name, entry in read_file(tmp_path / "f").items()} == {"w": (2,), "empty": (0, 3)}
    (tmp_path / "f").write_bytes(chunked())
    assert read(tmp_path / "f")["w"].shape == (2, 2)


def test_values_in_longer_encodings_than_necessary_are_read(tmp_path: Path) -> None:
    """Flax's reader accepts every encoding that msgpack allows."""
    payload = (
        b"\xdd\0\0\0\x03" + b"\xdc\0\x01\xd3\0\0\0\0\0\0\0\x02" + b"\xda\0\x07float32" + b"\xc6\0\0\0\x08" + bytes(8)
    )
    content = b"\xdf\0\0\0\x01\xdb\0\0\0\x01w\xc9" + len(payload).to_bytes(4, "big") + b"\x01" + payload
    (tmp_path / "f").write_bytes(content)
    assert_same_tensors(read(tmp_path / "f"), flax.serialization.msgpack_restore(content))


def test_reading_the_tree_does_not_read_the_arrays(tmp_path: Path) -> None:
    """The arrays are sparse, 4 GiB each: only their headers are read, and no memory is allocated for the data."""
    path, count, nbytes = tmp_path / "large", 8, 2**32 - 64
    with open(path, "wb") as file:
        file.write(bytes([0x80 + count]))
        for i in range(count):
            start = b"\x93\x91\xce" + nbytes.to_bytes(4, "big") + b"\xa5uint8\xc6" + nbytes.to_bytes(4, "big")
            file.write(b"\xa1%d\xc9" % i + (len(start) + nbytes).to_bytes(4, "big") + b"\x01" + start)
            file.seek(nbytes, os.SEEK_CUR)
        file.truncate(file.tell())
    entries = read_file(path)
    assert [entry.nbytes for entry in entries.values()] == [nbytes] * count


@pytest.mark.parametrize(
    ("start", "expected"),
    [(b"\x81\xabtransformer", True), (b"\x80", False), (b"\x80\x02}", False), (b"", False), (b"PK\x03\x04", False)],
)
def test_a_file_is_recognised_by_its_first_bytes(tmp_path: Path, start: bytes, expected: bool) -> None:
    (tmp_path / "f").write_bytes(start)
    assert is_msgpack(tmp_path / "f") is expected
    assert not is_msgpack(tmp_path)

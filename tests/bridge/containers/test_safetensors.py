"""The safetensors container against the safetensors package, and against hostile files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from support.models import SMALLEST
from support.refusals import assert_refused
from support.tensors import assert_same_tensors

from bridge import CheckpointError
from bridge.containers import safetensors as container
from bridge.containers.safetensors import read_file, write_file
from bridge.storage.dtypes import SAFETENSORS_DTYPES
from bridge.storage.tensors import LazyTensorMap

TORCH_DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def samples(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Return one tensor of random bytes for every dtype of the format, NaN payloads included."""
    rng = np.random.default_rng(0)
    size = int(np.prod(shape))
    tensors = {}
    for name, dtype in SAFETENSORS_DTYPES.items():
        raw = rng.integers(0, 2 if name == "BOOL" else 256, size * dtype.itemsize, np.uint8)
        tensors[f"a {name} é"] = raw.view(dtype).reshape(shape)
    return tensors


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    write_file(path, LazyTensorMap.of(tensors), {"format": "pt"})
    return path


def torch_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# Against the package


@pytest.mark.parametrize("shape", [(3, 5, 2), (7,), (), (0,), (3, 0, 2)], ids=str)
def test_files_of_the_package_from_numpy_are_read(tmp_path: Path, shape: tuple[int, ...]) -> None:
    safetensors.numpy.save_file(samples(shape), tmp_path / "f.safetensors", {"format": "np", "näme": "å"})
    tensors, metadata = read_file(tmp_path / "f.safetensors")
    assert_same_tensors(tensors, samples(shape))
    assert metadata == {"format": "np", "näme": "å"}


@pytest.mark.parametrize("shape", [(3, 5, 2), (), (0, 4)], ids=str)
def test_files_of_the_package_from_torch_are_read(tmp_path: Path, shape: tuple[int, ...]) -> None:
    theirs = {str(dtype): (100 * torch.randn(shape)).to(dtype) for dtype in TORCH_DTYPES}
    safetensors.torch.save_file(theirs, tmp_path / "f.safetensors")
    tensors, metadata = read_file(tmp_path / "f.safetensors")
    assert metadata == {}
    assert set(tensors) == set(theirs)
    for name, tensor in theirs.items():
        assert tensors[name].shape == tuple(tensor.shape)
        assert str(tensors[name].dtype) == name.removeprefix("torch.")
        assert tensors[name].tobytes() == torch_bytes(tensor), name


@pytest.mark.parametrize("shape", [(3, 5, 2), (7,), (), (0,), (3, 0, 2)], ids=str)
def test_the_package_reads_written_files(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Dtypes of descending and ascending width with odd sizes, so that tensors start at odd addresses."""
    for number, tensors in enumerate((samples(shape), dict(reversed(samples(shape).items())))):
        path = write(tmp_path / f"{number}.safetensors", tensors)
        assert_same_tensors(safetensors.numpy.load_file(path), tensors)
        for name, tensor in safetensors.torch.load_file(path).items():
            assert torch_bytes(tensor) == tensors[name].tobytes(), name
            assert tuple(tensor.shape) == shape
        with safetensors.safe_open(path, "np") as file:
            assert file.metadata() == {"format": "pt"}


def test_written_files_are_read_back_in_their_order(tmp_path: Path) -> None:
    tensors = samples((3, 5))
    found, metadata = read_file(write(tmp_path / "f.safetensors", tensors))
    assert list(found) == list(tensors)
    assert_same_tensors(found, tensors)
    assert metadata == {"format": "pt"}


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, samples((3,))).read_bytes() for name in ("a", "b"))
    assert first == second
    assert int.from_bytes(first[:8], "little") % 8 == 0, "data starts at a multiple of 8 bytes, as the format requires"


def test_a_file_without_tensors_survives_a_round_trip(tmp_path: Path) -> None:
    path = write(tmp_path / "f.safetensors", {})
    assert safetensors.numpy.load_file(path) == {}
    assert dict(read_file(path)[0]) == {}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int8], ids=lambda d: np.dtype(d).name)
def test_arrays_that_are_not_contiguous_are_written_correctly(tmp_path: Path, dtype: type) -> None:
    """The package's own writer stores the wrong bytes for these (upstream issue 825)."""
    base = np.arange(2 * 6 * 8).reshape(2, 6, 8).astype(dtype)
    tensors = {
        "transposed": base[0].T,
        "permuted": base.transpose(1, 2, 0),
        "strided": base[:, ::2, 1::3],
        "reversed": base[::-1, :, ::-1],
        "column": base[0][:, 3],
        "broadcast": np.broadcast_to(base[0, 0], (5, 8)),
        "fortran": np.asfortranarray(base[1]),
    }
    assert not any(array.flags.c_contiguous for array in tensors.values())
    path = write(tmp_path / "f.safetensors", tensors)
    assert_same_tensors(safetensors.numpy.load_file(path), tensors)
    assert_same_tensors(read_file(path)[0], tensors)


@pytest.mark.parametrize("dtype", [np.complex64, ">f4", ml_dtypes.float8_e4m3fn, "U3"])
def test_an_unsupported_dtype_is_refused_before_anything_is_written(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(CheckpointError, match=r"'odd': safetensors cannot hold"):
        write(tmp_path / "f.safetensors", {"odd": np.zeros(3, dtype)})
    assert list(tmp_path.iterdir()) == []


def test_a_header_beyond_the_limits_for_reading_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="20000 tensors need a header of"):
        write(tmp_path / "f.safetensors", dict.fromkeys(map(str, range(20_000)), np.zeros(1, np.float32)))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "f.safetensors").write_text("mine")
    with pytest.raises(FileExistsError):
        write(tmp_path / "f.safetensors", samples((2,)))
    assert (tmp_path / "f.safetensors").read_text() == "mine"


def test_a_tensor_that_changes_while_it_is_written_is_an_error(tmp_path: Path) -> None:
    tensors = LazyTensorMap.of({"w": np.zeros(3, np.float32)})
    entry = tensors.entries["w"]
    tensors.entries["w"] = type(entry)(entry.dtype, entry.shape, lambda: np.zeros(4, np.float32))
    with pytest.raises(CheckpointError, match="'w' changed"):
        write_file(tmp_path / "f.safetensors", tensors, {})


def test_arrays_are_writeable_and_aligned_for_jax(tmp_path: Path) -> None:
    tensors, _ = read_file(write(tmp_path / "f.safetensors", samples((3, 5))))
    for array in tensors.values():
        assert array.flags.writeable and array.flags.c_contiguous
        assert array.ctypes.data % 64 == 0


def test_every_access_reads_the_file_again(tmp_path: Path) -> None:
    tensors, _ = read_file(write(tmp_path / "f.safetensors", {"w": np.zeros(3, np.float32)}))
    tensors["w"][:] = 1
    assert not tensors["w"].any()


# Hostile and damaged files


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(shape: Any = (2,), begin: Any = 0, end: Any = 8, dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


GOOD = tensor()
ENTRY = json.dumps(GOOD).encode()

# The content of the file, and a part of the error message.
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "only 0 bytes; the file is empty or truncated"),
    "7 bytes": (b"\x08\0\0\0\0\0\0", "only 7 bytes"),
    "8 zero bytes": (bytes(8), "not valid JSON"),
    "all zeros": (bytes(1000), "not valid JSON"),
    "header length 2^64-1": (b"\xff" * 8 + b"{}", "header would be longer than the file"),
    "header length 2^63": (file_of({}, b"", 2**63), "header would be longer"),
    "header length 10^8+1": (file_of({}, b"", 10**8 + 1), "header would be longer"),
    "header length is the file's": (file_of({}, b"", 10), "header would be longer"),
    "header one byte too long": (file_of({}, b"", 3), "header would be longer"),
    "header truncated": (file_of({"w": GOOD}, bytes(8))[:30], "header would be longer"),
    "header too large to be one": (file_of(b" " * (2**20 + 1)), "the limit is 1048576"),
    "header not UTF-8": (file_of(b'{"\xff": 1}'), "not valid JSON"),
    "header in UTF-16": (file_of("{}".encode("utf-16")), "not valid JSON"),
    "not JSON": (file_of(b"weights!"), "not valid JSON"),
    "JSON and more": (file_of(b"{} {}"), "not valid JSON"),
    "a list": (file_of([GOOD]), "must hold an object, not list"),
    "null": (file_of(None), "must hold an object, not NoneType"),
    "nested 100,000 deep": (file_of(b"[" * 100_000), "not valid JSON"),
    "nested objects 100,000 deep": (file_of(b'{"a":' * 100_000), "not valid JSON"),
    "duplicate name": (file_of(b'{"w":' + ENTRY + b',"w":' + ENTRY + b"}", bytes(8)), "'w' appears twice"),
    "duplicate escaped name": (
        file_of(b'{"w":' + ENTRY + b',"\\u0077":' + ENTRY + b"}", bytes(8)),
        "'w' appears twice",
    ),
    "duplicate metadata": (file_of(b'{"__metadata__":{},"__metadata__":{}}'), "'__metadata__' appears twice"),
    "duplicate field": (file_of(b'{"w":{"dtype":"F32","dtype":"I8"}}'), "'dtype' appears twice"),
    "metadata not strings": (file_of({"__metadata__": {"a": 1}}), "__metadata__ must map names to strings"),
    "metadata a list": (file_of({"__metadata__": []}), "__metadata__ must map"),
    "metadata null": (file_of({"__metadata__": None}), "__metadata__ must map"),
    "entry a list": (file_of({"w": []}), "must have exactly dtype, shape and data_offsets"),
    "entry null": (file_of({"w": None}), "must have exactly"),
    "no shape": (file_of({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "must have exactly"),
    "a field too many": (file_of({"w": tensor(strides=[1])}, bytes(8)), "must have exactly"),
    "offsets reversed": (file_of({"w": tensor(begin=8, end=0)}, bytes(8)), "are not two positions in"),
    "offset negative": (file_of({"w": tensor(begin=-8, end=0)}, bytes(8)), "are not two positions in"),
    "offset a float": (file_of({"w": tensor(begin=0.0)}, bytes(8)), "are not two positions in"),
    "offset a bool": (file_of({"w": tensor((1,), False, True, "I8")}, bytes(1)), "are not two positions in"),
    "offset a string": (file_of({"w": tensor(end="8")}, bytes(8)), "are not two positions in"),
    "offset NaN": (file_of({"w": tensor(end=float("nan"))}, bytes(8)), "are not two positions in"),
    "offset null": (file_of({"w": {**GOOD, "data_offsets": None}}, bytes(8)), "are not two positions in"),
    "one offset": (file_of({"w": {**GOOD, "data_offsets": [8]}}, bytes(8)), "are not two positions in"),
    "three offsets": (file_of({"w": {**GOOD, "data_offsets": [0, 4, 8]}}, bytes(8)), "are not two positions in"),
    "past the end": (file_of({"w": GOOD}, bytes(7)), "the file has 7: it is truncated"),
    "far past the end": (file_of({"w": tensor((2**40,), 0, 2**42)}, bytes(8)), "but the file has 8: it is truncated"),
    "overlapping": (file_of({"w": GOOD, "x": tensor(begin=4, end=12)}, bytes(12)), "'x' overlaps"),
    "the same range": (file_of({"w": GOOD, "x": GOOD}, bytes(8)), "'x' overlaps"),
    "a hole": (file_of({"w": GOOD, "x": tensor(begin=12, end=20)}, bytes(20)), "'x' leaves a hole"),
    "a hole at the start": (file_of({"w": tensor(begin=1, end=9)}, bytes(9)), "'w' leaves a hole"),
    "an empty tensor in a hole": (file_of({"w": tensor((0,), 3, 3)}, bytes(3)), "'w' leaves a hole"),
    "trailing bytes": (file_of({"w": GOOD}, bytes(9)), "1 bytes after the last tensor"),
    "data without tensors": (file_of({}, bytes(9)), "9 bytes after the last tensor"),
    "shape too small": (file_of({"w": tensor((1,))}, bytes(8)), "needs '4' bytes, but data_offsets give 8"),
    "shape too large": (file_of({"w": tensor((3,))}, bytes(8)), "needs '12' bytes"),
    "shape product overflows to 0": (file_of({"w": tensor((2**32, 2**32), 0, 0)}), "bytes, but data_offsets give 0"),
    "shape product overflows to 8": (file_of({"w": tensor((2**62 + 2,))}, bytes(8)), "data_offsets give 8"),
    "size beyond 64 bits": (file_of({"w": tensor((2**64, 0), 0, 0)}), "is not a list of at most 16 sizes"),
    "size negative": (file_of({"w": tensor((-1, -2))}, bytes(8)), "is not a list of at most 16 sizes"),
    "size a float": (file_of({"w": tensor((2.0,))}, bytes(8)), "is not a list of"),
    "size a bool": (file_of({"w": tensor((True, 2))}, bytes(8)), "is not a list of"),
    "shape a number": (file_of({"w": tensor(2)}, bytes(8)), "is not a list of"),
    "rank 10,000": (file_of({"w": tensor([1] * 9_999 + [2])}, bytes(8)), "is not a list of at most 16 sizes"),
    "unknown dtype": (file_of({"w": tensor(dtype="F33")}, bytes(8)), "dtype 'F33' is not one of F32, F16"),
    "8-bit float": (file_of({"w": tensor((8,), dtype="F8_E4M3")}, bytes(8)), "dtype 'F8_E4M3' is not one of"),
    "4-bit float": (file_of({"w": tensor((16,), dtype="F4")}, bytes(8)), "dtype 'F4' is not one of"),
    "dtype in lower case": (file_of({"w": tensor(dtype="f32")}, bytes(8)), "dtype 'f32' is not one of"),
    "dtype a list": (file_of({"w": tensor(dtype=["F32"])}, bytes(8)), "is not one of"),
    "dtype null": (file_of({"w": tensor(dtype=None)}, bytes(8)), "dtype 'None' is not one of"),
    "git-LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 548105171\n",
        "git-LFS pointer, not the weights; run `git lfs pull`",
    ),
    "HTML page": (b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>", "HTML page, not weights"),
    "HTML page without doctype": (b"\n <HTML><head></head></html>", "HTML page, not weights"),
}


@pytest.mark.parametrize(("content", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    directory = tmp_path / "damaged"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(SMALLEST.to_hf()))
    (directory / "model.safetensors").write_bytes(content)
    assert_refused(directory, message, capsys, CheckpointError)
    with pytest.raises(CheckpointError, match=re.escape(str(directory / "model.safetensors"))):
        read_file(directory / "model.safetensors")


@pytest.mark.parametrize("depth", range(850, 1010, 10))
def test_nesting_close_to_the_parsers_limit_is_refused(tmp_path: Path, depth: int) -> None:
    """A value that the parser just accepts must also be shallow enough to be formatted for the message."""
    nested = b"[" * depth + b"]" * depth
    (tmp_path / "f").write_bytes(file_of(b'{"w":{"dtype":"F32","data_offsets":[0,8],"shape":' + nested + b"}}"))
    with pytest.raises(CheckpointError):
        read_file(tmp_path / "f")


def test_the_unedited_entry_of_these_tests_is_valid(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(file_of({"w": GOOD, "empty": tensor((0, 3), 8, 8)}, bytes(8)))
    assert {name: array.shape for name, array in read_file(tmp_path / "f")[0].items()} == {"w": (2,), "empty": (0, 3)}


def test_a_header_padded_with_spaces_is_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(file_of(json.dumps({"w": GOOD}).encode() + b" " * 1000, bytes(8)))
    assert read_file(tmp_path / "f")[0]["w"].shape == (2,)


@pytest.mark.parametrize("name", ["../../etc/passwd", "a\0b", "a\nb", "\x1b[31mred\x1b[0m", "\u202egnp", "\ud800"])
def test_odd_names_are_data_and_their_control_characters_are_escaped(tmp_path: Path, name: str) -> None:
    (tmp_path / "f").write_bytes(file_of({name: tensor(dtype="no")}, bytes(8)))
    with pytest.raises(CheckpointError) as caught:
        read_file(tmp_path / "f")
    assert str(caught.value).isprintable()
    (tmp_path / "f").write_bytes(file_of({name: GOOD}, bytes(8)))
    assert list(read_file(tmp_path / "f")[0]) == [name]


def test_the_message_has_the_end_of_a_long_path(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 100) / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=re.escape(f"'{path}'")):
        read_file(path)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_file(tmp_path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors': No such file"):
        read_file(tmp_path / "gone.safetensors")


@pytest.mark.timeout(10)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_a_fifo_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_file(tmp_path / "fifo")


@pytest.mark.timeout(10)
@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="this system has no /dev/zero")
def test_an_endless_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_file(tmp_path / "zero")


def test_a_file_that_shrinks_after_opening_is_an_error_on_read(tmp_path: Path) -> None:
    path = write(tmp_path / "f.safetensors", {"a": np.ones(5, np.float32), "b": np.ones(1000, np.float32)})
    tensors, _ = read_file(path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"f\.safetensors' changed since it was opened"):
        tensors["b"]
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*No such file"):
        tensors["a"]


def test_a_file_that_was_replaced_is_an_error_on_read(tmp_path: Path) -> None:
    path = write(tmp_path / "f.safetensors", {"a": np.ones(5, np.float32)})
    tensors, _ = read_file(path)
    write(tmp_path / "g.safetensors", {"a": np.zeros(5, np.float32)}).rename(path)
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        tensors["a"]


def test_reading_the_header_does_not_read_the_data(tmp_path: Path) -> None:
    """The file is sparse, with 1 TiB of data: only its header is read, and no memory is allocated for the data."""
    path = tmp_path / "large.safetensors"
    path.write_bytes(file_of({"w": tensor((2**38,), 0, 2**40)}))
    os.truncate(path, path.stat().st_size + 2**40)
    tensors, _ = read_file(path)
    assert tensors.entries["w"].nbytes == 2**40


def test_a_written_file_that_the_package_cannot_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(container._NAMES, np.dtype("f4"), "F99")
    with pytest.raises(CheckpointError, match="the safetensors package cannot read the written file"):
        write_file(tmp_path / "a", LazyTensorMap.of({"x": np.ones(3, "f4")}), {})

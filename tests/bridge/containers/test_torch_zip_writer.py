"""Torch files written without torch, against `torch.load`: torch 2.13 reads every one of these."""

from __future__ import annotations

import os
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from bridge import CheckpointError
from bridge.containers import torch_zip_writer as torch_writer
from bridge.containers.torch_zip_writer import STORAGES, write_file
from bridge.storage.tensors import LazyTensor, transposed
from gpt2_torch.arrays import array_from_tensor


def random_entry(dtype: np.dtype, shape: tuple[int, ...] = (3, 5)) -> LazyTensor:
    """Return a tensor of random bytes, NaN payloads included."""
    raw = np.random.default_rng(0).integers(0, 2 if dtype == np.bool_ else 256, (*shape, dtype.itemsize), np.uint8)
    return LazyTensor.of(np.asarray(raw.view(dtype).reshape(shape)))


def loaded(path: Path, value: Any) -> Any:
    write_file(path, value)
    return torch.load(path, weights_only=True)


def assert_same(tensor: torch.Tensor, entry: LazyTensor) -> None:
    array = entry.read()
    assert (tuple(tensor.shape), array_from_tensor(tensor).dtype) == (array.shape, array.dtype)
    assert array_from_tensor(tensor).tobytes() == array.tobytes()


@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (0,), (2, 0, 3)], ids=str)
def test_torch_reads_tensors_of_every_type_and_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    entries = {str(dtype): random_entry(dtype, shape) for dtype in STORAGES}
    tensors = loaded(tmp_path / "f.pt", entries)
    assert list(tensors) == list(entries)
    for name, entry in entries.items():
        assert_same(tensors[name], entry)
        assert tensors[name].stride() == torch.empty(shape).stride()
        assert not tensors[name].requires_grad


PLAIN: dict[str, Any] = {
    "none": None,
    "bools": [True, False],
    "integers": [0, -1, 255, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63, -(2**63), 10**400],
    "floats": [0.0, -0.0, 1.5, float("inf"), 5e-324],
    "text": ["", "é", "\ud800", "a\0b\n", "x" * 1000],
    "tuples": [(), (1,), (0.9, 0.95), ("a", "b", "c"), ((1, 2), ())],
    "nested": {0: {"params": [0, 1, 2]}, "": {}, "list": [[], [[]]]},
}


@pytest.mark.parametrize("weights_only", [True, False])
def test_torch_reads_plain_values_unchanged(tmp_path: Path, weights_only: bool) -> None:
    write_file(tmp_path / "f.pt", PLAIN)
    found = torch.load(tmp_path / "f.pt", weights_only=weights_only)
    assert repr(found) == repr(PLAIN), "repr also shows types and the sign of zero"


def test_an_array_that_is_not_contiguous_is_written_correctly(tmp_path: Path) -> None:
    entry = transposed(random_entry(np.dtype(np.int32)))
    [tensor] = loaded(tmp_path / "f.pt", [entry])
    assert_same(tensor, entry)
    assert tensor.is_contiguous()


def test_only_a_repeated_entry_shares_its_storage(tmp_path: Path) -> None:
    one, equal = (random_entry(np.dtype(np.float32)) for _ in range(2))
    first, again, other = loaded(tmp_path / "f.pt", [one, one, equal])
    assert first.data_ptr() == again.data_ptr() != other.data_ptr()
    assert os.path.getsize(tmp_path / "f.pt") < 3000


def test_the_archive_is_laid_out_as_torch_does(tmp_path: Path) -> None:
    """Records are uncompressed, have checksums and start at multiples of 64 bytes, for mmap. The pickle is first."""
    entries = [random_entry(dtype, (k + 1,)) for k, dtype in enumerate(STORAGES)]
    write_file(tmp_path / "f.pt", entries)
    with zipfile.ZipFile(tmp_path / "f.pt") as archive:
        assert archive.testzip() is None
        assert archive.namelist()[0] == "archive/data.pkl"
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    file = torch._C.PyTorchFileReader(str(tmp_path / "f.pt"))
    assert {file.get_record_offset(name) % 64 for name in file.get_all_records()} == {0}
    for tensor, entry in zip(torch.load(tmp_path / "f.pt", mmap=True, weights_only=True), entries, strict=True):
        assert_same(tensor, entry)


def test_the_same_value_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        write_file(tmp_path / name, {"w": random_entry(np.dtype(np.float32)), **PLAIN})
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_records_with_wide_sizes_are_aligned_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of a gigabyte and more have 64-bit sizes."""
    monkeypatch.setattr(torch_writer, "_ZIP64_FROM", 0)
    entry = random_entry(np.dtype(np.float32), (300,))
    [tensor] = loaded(tmp_path / "f.pt", [entry])
    assert_same(tensor, entry)
    content = (tmp_path / "f.pt").read_bytes()
    assert content.index(entry.read().tobytes()) % 64 == 0
    assert struct.pack("<HHQQ", 1, 16, 1200, 1200) in content, "the zip64 field of the record"


def test_only_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    shape, nbytes = (1024, 1024), 4 * 2**20
    entries = [LazyTensor(np.dtype(np.float32), shape, lambda k=k: np.full(shape, k, np.float32)) for k in range(8)]
    tracemalloc.start()
    try:
        write_file(tmp_path / "f.pt", entries)
        assert tracemalloc.get_traced_memory()[1] < 1.1 * nbytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "value",
    [object(), np.float32(1), {"a": [b"bytes"]}, {1, 2}, 1 << 2040, np.zeros(3), {("a",): Path("x")}],
    ids=lambda value: type(value).__name__,
)
def test_values_that_torch_does_not_load_as_data_are_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match="cannot write a"):
        write_file(tmp_path / "f.pt", value)
    assert not (tmp_path / "f.pt").exists()


def test_types_that_torch_does_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="float8_e4m3fn"):
        write_file(tmp_path / "f.pt", LazyTensor.of(np.zeros(3, ml_dtypes.float8_e4m3fn)))


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "f.pt").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "f.pt", {})
    assert (tmp_path / "f.pt").read_bytes() == b"mine"

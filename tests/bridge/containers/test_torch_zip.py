"""The reader of torch files against torch, and malicious files."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import SMALLEST, random_state
from support.refusals import assert_refused
from support.torch_archives import archive, integer, name, pickled, tensor, text

from bridge import CheckpointError
from bridge.containers.torch_zip import read_file
from bridge.storage.tensors import LazyTensor
from gpt2_torch.arrays import array_from_tensor, tensor_from_array

FOUR = np.arange(4, dtype=np.float32).tobytes()


def saved(path: Path, value: object, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


# Files of torch 2.13


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_value_of_a_training_state_is_read(tmp_path: Path, protocol: int) -> None:
    plain = {"n": 3, "big": 2**40, "x": 0.5, "b": True, "none": None, "list": [1, [2]], "tuple": (1, "ä"), "0": {}}
    path = saved(tmp_path / "f", {**plain, "t": torch.ones(2, 3)}, pickle_protocol=protocol)
    found = read_file(path)
    entry = found.pop("t")
    assert found == plain
    assert isinstance(entry, LazyTensor)
    assert (entry.shape, entry.dtype, entry.read().tolist()) == ((2, 3), np.float32, [[1.0] * 3] * 2)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int8", "uint8", "bool"])
def test_every_type_and_every_view_is_read_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    base = (100 * torch.randn(4, 6)).to(getattr(torch, dtype))
    views = {
        "whole": base,
        "transposed": base.T,
        "rows": base[1:3],
        "columns": base[:, 2:5],
        "every second": base[::2, ::3],
        "scalar": base[1, 1],
        "empty": base[:0],
        "other": base.clone(),
        "parameter": torch.nn.Parameter(base.clone(), requires_grad=False),
    }
    found = read_file(saved(tmp_path / "f", views))
    for what, view in views.items():
        array = found[what].read()
        assert (array.shape, str(array.dtype)) == (tuple(view.shape), dtype), what
        assert array.tobytes() == array_from_tensor(view.detach().contiguous()).tobytes(), what


def test_a_state_dict_with_metadata_is_read(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    found = read_file(saved(tmp_path / "f", module.state_dict()))
    assert {n: e.read().tolist() for n, e in found.items()} == {n: t.tolist() for n, t in module.state_dict().items()}


def test_a_checksum_of_zero_is_not_verified(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(with_checksum(archive(pickled(tensor()), {"data/0": FOUR}), 0))
    assert read_file(path)["w"].read().tolist() == [0, 1, 2, 3]


def test_files_of_torch_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "f", {"w": torch.ones(3)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_file(path)["w"].read().tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64"])
def test_dtypes_without_a_typed_storage_are_read(tmp_path: Path, dtype: str) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(getattr(torch, dtype))
    array = read_file(saved(tmp_path / "f", [tensor.T]))[0].read()
    assert (str(array.dtype), array.tolist()) == (dtype, [[0, 3], [1, 4], [2, 5]])


def test_a_tied_tensor_is_the_same_object_and_its_views_are_not(tmp_path: Path) -> None:
    w = torch.ones(3, 3)
    found = read_file(saved(tmp_path / "f", {"wte": w, "head": w.detach(), "transposed": w.T, "copy": w.clone()}))
    assert found["wte"] is found["head"]
    assert len({id(entry) for entry in found.values()}) == 3


def test_the_device_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(archive(pickled(tensor().replace(text("cpu"), text("cuda:0"))), {"data/0": FOUR}))
    assert read_file(path)["w"].read().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (torch.ones(2, dtype=torch.complex64), "torch.ComplexFloatStorage"),
        (torch.ones(2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (torch.ones(2, device="meta"), "torch._utils._rebuild_meta_tensor_no_storage"),
        (torch.ones(2).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (torch.float32, "torch.float32"),
        (torch.device("cpu"), "torch.device"),
        (np.float64(1), "numpy._core.multiarray.scalar"),
        (np.ones(2), "numpy._core.multiarray._reconstruct"),
        (Path("x"), "pathlib."),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (b"bytes", "_codecs.encode"),
        ({1, 2}, "__builtin__.set"),  # its name in protocol 2
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_error_names_values_that_are_not_plain_tensors(tmp_path: Path, value: object, named: str) -> None:
    with pytest.raises(CheckpointError, match=f"refers to '{re.escape(named)}") as caught:
        read_file(saved(tmp_path / "f", {"w": value}))
    assert "f': data.pkl" in str(caught.value)


def test_torch_reads_the_archive_of_these_tests(tmp_path: Path) -> None:
    """The archive is built here and not by torch. torch reads the same values from it."""
    path = tmp_path / "f"
    path.write_bytes(archive(pickled(tensor()), {"data/0": FOUR, "data/1": b""}))
    assert torch.load(path, weights_only=True)["w"].tolist() == read_file(path)["w"].read().tolist()


# Hostile files as the weights of a Hugging Face directory


def with_checksum(content: bytes, crc: int) -> bytes:
    """Set the checksum of the record `data/0` in both of its headers."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        [member] = [i for i in file.infolist() if i.filename.endswith("data/0")]
    return content.replace(struct.pack("<I", member.CRC), struct.pack("<I", crc))


def member(content: bytes, change: Callable[[bytearray, int], None], central: bool = True) -> bytes:
    """Change the entry of `data/0` in the central directory, or its local header."""
    changed = bytearray(content)
    found = content.rfind(b"archive/data/0") - 46 if central else content.find(b"archive/data/0") - 30
    change(changed, found)
    return bytes(changed)


def patched(at: int, value: int, width: int = 2, central: bool = True) -> bytes:
    def change(content: bytearray, start: int) -> None:
        content[start + at : start + at + width] = value.to_bytes(width, "little")

    return member(GOOD, change, central)


def compressed() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickled(tensor()))
        file.writestr("archive/data/0", FOUR)
    return out.getvalue()


def with_twice(record: str) -> bytes:
    out = io.BytesIO(GOOD)
    with zipfile.ZipFile(out, "a") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning about a duplicate name
        file.writestr(record, b"\x80\x02}.")
    return out.getvalue()


def legacy() -> bytes:
    out = io.BytesIO()
    torch.save({"w": torch.ones(2)}, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def big_endian() -> bytes:
    return archive(pickled(tensor()), {"data/0": FOUR, "byteorder": b"big"})


def aliased(times: int) -> bytes:
    """Return the pickle of a list in which the same tensor is rebuilt this many times from the same arguments."""
    arguments, call = tensor().removesuffix(b"R"), name("torch._utils", "_rebuild_tensor_v2")
    kept = call + b"q\0" + arguments.removeprefix(call) + b"q\1R"
    return b"\x80\x02](" + kept + b"h\0h\1R" * (times - 1) + b"e."


def of(pickle: bytes, **records: bytes) -> bytes:
    return archive(pickle, {"data/0": FOUR, **{key.replace("__", "/"): content for key, content in records.items()}})


GOOD = archive(pickled(tensor()), {"data/0": FOUR})
MANY = 100_000
MALFORMED: dict[str, tuple[Callable[[], bytes], str]] = {
    # the archive
    "truncated": (lambda: GOOD[:-10], "pytorch_model.bin"),
    "the beginning alone": (lambda: GOOD[:30], "pytorch_model.bin"),
    "something behind": (lambda: GOOD + b"x", "pytorch_model.bin"),
    "two data.pkl": (lambda: with_twice("archive/data.pkl"), "data.pkl"),
    "two archives": (lambda: with_twice("other/data.pkl"), "that torch.save did not write"),
    "no data.pkl": (lambda: GOOD.replace(b"data.pkl", b"data.pkx"), "data.pkl"),
    "another local name": (lambda: GOOD.replace(b"archive/data/0", b"archive/data/1", 1), "data/0"),
    "encrypted": (lambda: patched(8, 1), "data/0"),
    "flag-patched": (lambda: patched(8, 0x40), "data/0"),
    "patched in one place": (lambda: patched(6, 0x800, central=False), "data/0"),
    "deflated": (compressed, "compressed"),
    "method-patched": (lambda: patched(10, 8), "data/0"),
    "a checksum in one place": (lambda: patched(16, 12345, 4), "data/0"),
    "a size past the end": (lambda: patched(24, 2**31, 4), "data/0"),
    "a header past the end": (lambda: patched(42, 2**31, 4), "pytorch_model.bin"),
    "marked as a directory": (lambda: patched(38, 0x10, 4), "directory"),
    "big-endian": (big_endian, "big-endian"),
    "before 1.6": (legacy, "before 1.6"),
    "a bare pickle": (lambda: pickle.dumps({"w": 1}, 4), "a pickle that torch.save did not write"),
    "TorchScript": (lambda: of(pickled(tensor()), code__x=b"1"), "TorchScript"),
    "constants": (lambda: archive(pickled(tensor()), {"constants.pkl": b"."}), "TorchScript"),
    # storages and strides
    "a storage larger than its record": (lambda: of(pickled(tensor(count=5))), "record"),
    "a storage smaller than its record": (lambda: of(pickled(tensor(count=3))), "record"),
    "a storage that is not there": (lambda: of(pickled(tensor("7"))), "data/7"),
    "a storage that climbs": (lambda: of(pickled(tensor("../../x"))), "which does not exist"),
    "an offset outside": (lambda: of(pickled(tensor(offset=1))), "that is larger than the record"),
    "a negative offset": (lambda: of(pickled(tensor(offset=-1))), "negative"),
    "a stride outside": (lambda: of(pickled(tensor(strides=(2,)))), "that is larger than the record"),
    "a negative stride": (lambda: of(pickled(tensor(strides=(-1,)))), "negative"),
    "stride 0 over a huge shape": (lambda: of(pickled(tensor(shape=(2**31 - 1,), strides=(0,)))), "repeats"),
    "stride 0 over a shape that overflows": (
        lambda: of(pickled(tensor(shape=(2**31 - 1,) * 3, strides=(0,) * 3))),
        "record",
    ),
    "a negative shape": (lambda: of(pickled(tensor(shape=(-4,)))), "negative"),
    "more sizes than strides": (lambda: of(pickled(tensor(shape=(2, 2)))), "strides"),
    "rank 10,000": (
        lambda: of(pickled(tensor(shape=(1,) * 10_000, strides=(1,) * 10_000))),
        "negative, too large or not integers",
    ),
    "one storage 100,000 times": (lambda: of(aliased(MANY)), "more than 10000 tensors"),
    "a storage as two types": (
        lambda: of(b"\x80\x02](" + tensor() + tensor().replace(b"FloatStorage", b"IntStorage") + b"e."),
        "as float32 and as int32",
    ),
    "a complex storage": (lambda: of(pickled(tensor().replace(b"FloatS", b"ComplexFloatS"))), "ComplexFloatStorage"),
    # the machine
    "a memo bomb": (lambda: of(b"\x80\x02]q\x00" + b"(h\x00h\x00lq\x00" * 64 + b"."), "data.pkl"),
    "a memo bomb of lists": (lambda: of(b"\x80\x02(]q\x00" + b"]h\x00ah\x00aq\x00" * 30 + b"t."), "or holds more than"),
    "a list of itself": (lambda: of(b"\x80\x02]q\x00h\x00a."), "nests its values deeper"),
    "PUT 2^31": (lambda: of(b"\x80\x02]r\x00\x00\x00\x80."), "2147483648"),
    "BINUNICODE of 4 GiB": (lambda: of(b"\x80\x02X\xff\xff\xff\xff."), "4294967295 bytes"),
    "LONG1 of nothing": (lambda: of(b"\x80\x02\x8a\xff."), "truncated"),
    "lists 100,000 deep": (lambda: of(b"\x80\x02" + b"]" * MANY + b"a" * (MANY - 1) + b"."), "deeper than"),
    "tuples 100,000 deep": (lambda: of(b"\x80\x02)" + b"\x85" * MANY + b"."), "deeper than"),
    "marks 100,000 deep": (lambda: of(b"\x80\x02" + b"(" * MANY + b"."), "data.pkl"),
    "too many opcodes": (lambda: of(b"\x80\x02" + b"N" * 1_000_000 + b"."), "more than"),
    "a pickle too large": (lambda: of(b"\x80\x02" + b"N" * 5_000_000 + b"."), "data.pkl"),
    "stack underflow": (lambda: of(b"\x80\x02a."), "pops from an empty stack"),
    "underflow over a mark": (lambda: of(b"\x80\x02](Na."), "data.pkl"),
    "a mark that was not set": (lambda: of(b"\x80\x02t."), "a mark that it has not set"),
    "dangling BINGET": (lambda: of(b"\x80\x02h\x09."), "reads the memo index 9, which is not set"),
    "no STOP": (lambda: of(b"\x80\x02}"), "truncated"),
    "a second pickle behind": (lambda: of(b"\x80\x02}.\x80\x02}."), "after its end"),
    "more on the stack": (lambda: of(b"\x80\x02}}."), "inside an unfinished value"),
    "protocol 0": (lambda: of(b"(dp0\n."), "protocol"),
    "protocol 6": (lambda: of(b"\x80\x06}."), "protocol"),
    "a dictionary as a key": (lambda: of(b"\x80\x02}}Ns."), "as a key"),
    "a key twice": (lambda: of(b"\x80\x02}(" + 2 * (text("w") + b"N") + b"u."), "'w' twice"),
    "a key without a value": (lambda: of(b"\x80\x02}(Nu."), "without a value"),
    "a name with escape codes": (lambda: of(b"\x80\x02" + name("\x1b[2J", "x") + b"."), "'\\x1b[2J.x'"),
    "a name too long": (lambda: of(b"\x80\x02" + name("x" * 5000, "y") + b"."), "longer than 256"),
    "a string not UTF-8": (lambda: of(b"\x80\x02X\x01\x00\x00\x00\xff."), "not UTF-8"),
    "hooks": (lambda: of(pickled(tensor().replace(b")R", b")R" + text("h") + b"Ns"))), "hooks or metadata"),
    "metadata, as of a negated view": (
        lambda: of(pickled(tensor().replace(b")Rt", b")R}" + text("neg") + b"\x88st"))),
        "hooks or metadata",
    ),
    "too few parts": (lambda: of(pickled(tensor().replace(b"\x89", b""))), "missing arguments"),
    "an integer as a tensor": (lambda: of(pickled(integer(3))), "'w' is int, not a tensor"),
    "a persistent id of nothing": (lambda: of(pickled(b")Q")), "not a storage"),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("make", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_hostile_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[], bytes], message: str
) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(SMALLEST.to_hf()))
    (directory / "pytorch_model.bin").write_bytes(make())
    assert_refused(directory, message, capsys, CheckpointError)


def test_a_wrong_checksum_is_an_error_when_the_record_is_read(tmp_path: Path) -> None:
    state = {name: tensor_from_array(array) for name, array in random_state(SMALLEST).items()}
    path = saved(tmp_path / "f", state)
    content = bytearray(path.read_bytes())
    at = content.find(random_state(SMALLEST)["wpe.weight"].tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    found = read_file(path)
    assert found["wte.weight"].read().size
    with pytest.raises(CheckpointError, match="f'"):
        found["wpe.weight"].read()


def test_opening_a_large_file_reads_only_the_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "f", {"w": torch.ones(1000, 1000)})
    sizes = []
    monkeypatch.setattr("bridge.storage.stored_file.aligned_empty", lambda s, d: sizes.append(s) or np.empty(s, d))
    assert read_file(path)["w"].shape == (1000, 1000)
    assert max(size for (size,) in sizes) < 1000


@pytest.mark.timeout(10)
def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_file(tmp_path / "f")

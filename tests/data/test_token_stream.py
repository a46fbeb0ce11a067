"""Token files of all kinds as one stream, and damaged files."""

from __future__ import annotations

import os
from io import FileIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support.refusals import within_budget

from gpt2_jax.data import DataError, TokenStream
from gpt2_jax.data.tokens.files import token_file
from gpt2_jax.data.tokens.stream import is_token_source, open_tokens
from tests.data.token_files import llmc, nanogpt, npy

IDS = np.random.default_rng(7).integers(0, 50257, 1000)


def read_all(stream: TokenStream) -> np.ndarray:
    return stream.read(0, len(stream))


@pytest.mark.parametrize(
    "write",
    [
        nanogpt,
        llmc,
        lambda path, ids: llmc(path, ids, magic=20240801, version=7),
        lambda path, ids: npy(path.with_suffix(".npy"), ids),
        *(lambda path, ids, d=d: npy(path.with_suffix(".npy"), ids, d) for d in ("<i4", "<u4", "<i8")),
    ],
    ids=["nanogpt", "llmc", "llmc-uint32", "npy", "npy-i4", "npy-u4", "npy-i8"],
)
def test_every_kind_of_file_reads_the_same(tmp_path: Path, write) -> None:
    path = write(tmp_path / "tokens.bin", IDS)
    assert is_token_source(path)
    stream, validation = open_tokens(path)
    assert validation is None and stream.document_ends is None
    assert read_all(stream).dtype == np.int32
    np.testing.assert_array_equal(read_all(stream), IDS)
    np.testing.assert_array_equal(stream.read(13, 40), IDS[13:40])


def test_spans_cross_shards(tmp_path: Path) -> None:
    borders = [0, 1, 8, 300, 301, 999, 1000]
    for i, (a, b) in enumerate(pairwise(borders)):
        llmc(tmp_path / f"shard_{i:06d}.bin", IDS[a:b])
    stream, _ = open_tokens(tmp_path / "shard_*.bin")
    rng = np.random.default_rng(3)
    spans = [tuple(sorted(rng.integers(0, 1001, 2).tolist())) for _ in range(200)]
    for (start, stop), ids in zip(spans, stream.read_spans(spans), strict=True):
        np.testing.assert_array_equal(ids, IDS[start:stop])
    part = stream.part(5, 700).part(10, 600)
    assert len(part) == 590
    np.testing.assert_array_equal(read_all(part), IDS[15:605])
    with pytest.raises(IndexError):
        part.read(0, 591)


def test_files_follow_each_other_by_name_and_may_be_of_different_kinds(tmp_path: Path) -> None:
    npy(tmp_path / "b.npy", IDS[10:30], "<i8")
    llmc(tmp_path / "a.bin", IDS[:10])
    nanogpt(tmp_path / "c.bin", IDS[30:])
    (tmp_path / "readme.md").write_text("not tokens")
    (tmp_path / ".hidden.bin").write_bytes(b"odd")
    np.testing.assert_array_equal(read_all(open_tokens(tmp_path)[0]), IDS)


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ("train.bin", "val.bin"),  # nanoGPT
        ("tiny_shakespeare_train.bin", "tiny_shakespeare_val.bin"),  # llm.c
        ("fineweb_train_000001.bin", "fineweb_val_000000.bin"),  # llm.c, and modded-nanogpt
        ("edufineweb_train_000001.bin", "edufineweb_validation_000000.bin"),
    ],
)
def test_files_named_train_and_val_are_two_streams(tmp_path: Path, train: str, validation: str) -> None:
    llmc(tmp_path / train, IDS[:900])
    llmc(tmp_path / validation, IDS[900:])
    streams = open_tokens(tmp_path)
    assert streams[1] is not None
    np.testing.assert_array_equal(read_all(streams[0]), IDS[:900])
    np.testing.assert_array_equal(read_all(streams[1]), IDS[900:])
    only, none = open_tokens(tmp_path / train)
    assert (len(only), none) == (900, None)


def test_only_files_named_val_are_validation_data(tmp_path: Path) -> None:
    nanogpt(tmp_path / "tokens_0.bin", IDS[:400])
    nanogpt(tmp_path / "tokens_1.bin", IDS[400:900])
    nanogpt(tmp_path / "val.bin", IDS[900:])
    train, validation = open_tokens(tmp_path / "*.bin")
    assert validation is not None
    np.testing.assert_array_equal(read_all(train), IDS[:900])
    np.testing.assert_array_equal(read_all(validation), IDS[900:])
    only, none = open_tokens(tmp_path / "val*.bin")
    assert (len(only), none) == (100, None)


def test_val_inside_a_word_is_not_a_split(tmp_path: Path) -> None:
    for name in ("medieval.bin", "trainer.bin", "valley_1.bin"):
        nanogpt(tmp_path / name, IDS[:10])
    stream, validation = open_tokens(tmp_path / "*.bin")
    assert (len(stream), validation) == (30, None)


def header(*values: int, size: int = 256) -> bytes:
    return np.array([*values, *[0] * (size - len(values))], "<i4").tobytes()


BAD_FILES = {
    "odd.bin": (b"123", "3 bytes, an odd number"),
    "empty.bin": (b"", "no tokens"),
    "no_tokens.bin": (header(20240520, 1, 0), "no tokens"),
    "short.bin": (header(20240520, 1, 10) + bytes(18), "should hold 10 tokens in 1044 bytes and has 1042"),
    "long.bin": (header(20240520, 1, 10) + bytes(22), "should hold 10 tokens"),
    "negative.bin": (header(20240520, 1, -1), "should hold"),
    "cut.bin": (header(20240520, 1, 10)[:6], "ends inside its header"),
    "version.bin": (header(20240520, 2, 1) + bytes(2), "version 2 of llm.c's shards, but only 1 is supported"),
    "version32.bin": (header(20240801, 1, 1) + bytes(4), "version 1 of llm.c's shards, but only 7 is supported"),
    "hellaswag.bin": (header(20240522, 1, 1) + bytes(8), "multiple-choice"),
    "cut.npy": (b"\x93NUMPY\x01\x00v\x00{'des", "cannot be read as .npy"),
    "magic.npy": (b"\x93NUMPY", "cannot be read as .npy"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_damaged_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        token_file(tmp_path / name)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 2), np.uint16), r"'<u2' of shape '\(3, 2\)'"),
        (np.zeros(3, np.float32), "<f4"),
        (np.zeros(3, ">u2"), ">u2"),
        (np.zeros(0, np.uint16), "no tokens|cannot be read"),
        (np.array(["a", None], object), r"\|O"),
        (np.zeros(3, [("a", "<u2")]), "cannot be read as .npy"),
        (np.uint16(3), r"of shape '\(\)'"),
    ],
    ids=["matrix", "float", "big-endian", "empty", "pickle", "structured", "scalar"],
)
def test_arrays_that_are_not_tokens_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "array.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        token_file(tmp_path / "array.npy")


def npy_bytes(shape: str, *, descr: str = "'<u2'", order: str = "False", version: bytes = b"\1\0") -> bytes:
    """A `.npy` file with ten bytes of data and a header that numpy would not write."""
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + len(header).to_bytes(2 if version[0] == 1 else 4, "little") + header + bytes(10)


BAD_HEADERS = {
    "huge": npy_bytes(f"({2**70},)"),
    "huge product": npy_bytes(f"({2**40}, {2**40})"),
    "longer than the file": npy_bytes("(6,)"),
    "shorter than the file": npy_bytes("(4,)"),
    "negative": npy_bytes("(-5,)"),
    "bool": npy_bytes("(True,)"),
    "float": npy_bytes("(5.0,)"),
    "no tuple": npy_bytes("(5)"),
    "leading zero": npy_bytes("(05,)"),
    "a thousand parentheses": npy_bytes("(" * 1000 + "5," + ")" * 1000),
    "ten thousand minus signs": npy_bytes("(" + "-" * 10_000 + "5,)"),
    "a minus sign for each byte of 60,000": npy_bytes("(" + "-" * 60_000 + "5,)"),
    "object": npy_bytes("(5,)", descr="'|O'"),
    "structured": npy_bytes("(5,)", descr="[('a', '<u2')]"),
    "string": npy_bytes("(5,)", descr="'<U99999999999'"),
    "unknown dtype": npy_bytes("(5,)", descr="'\x1b[31m'"),
    "order": npy_bytes("(5,)", order="'F'"),
    "version 0": npy_bytes("(5,)", version=b"\0\0"),
    "version 4": npy_bytes("(5,)", version=b"\4\0"),
    "no version": b"\x93NUMPY",
    "header of 4 GiB": b"\x93NUMPY\2\0\xff\xff\xff\xff",
    "truncated": npy_bytes("(5,)")[:40],
    "code": npy_bytes("(__import__('os').getpid(),)"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_hostile_headers_are_refused_quickly(tmp_path: Path, name: str) -> None:
    (tmp_path / "array.npy").write_bytes(BAD_HEADERS[name])
    with within_budget(), pytest.raises(DataError, match=r"array\.npy") as error:
        token_file(tmp_path / "array.npy")
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<u4", "<i8"])
def test_every_array_that_numpy_writes_is_read(tmp_path: Path, dtype: str, version: tuple[int, int]) -> None:
    for count in (1, 9, 99_999):
        ids = np.arange(count).astype(dtype)
        with (tmp_path / "array.npy").open("wb") as file:
            np.lib.format.write_array(file, ids, version)
        stream = TokenStream.of([token_file(tmp_path / "array.npy")], vocab_size=2**17)
        np.testing.assert_array_equal(read_all(stream), ids)


@pytest.mark.parametrize("header", ["(5L,)", "(5,)"])
@pytest.mark.parametrize("order", ["True", "False"])
def test_the_order_of_axes_does_not_matter_for_one_axis(tmp_path: Path, header: str, order: str) -> None:
    (tmp_path / "array.npy").write_bytes(npy_bytes(header, order=order))
    assert token_file(tmp_path / "array.npy").count == 5


def test_a_truncated_array_is_refused(tmp_path: Path) -> None:
    path = npy(tmp_path / "array.npy", IDS)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"cannot be read as .npy"):
        token_file(path)


@pytest.mark.parametrize(
    ("dtype", "bad", "vocab_size", "refused"),
    [
        ("<u2", 300, 300, True),
        ("<u2", 299, 300, False),
        ("<u2", 65535, None, False),
        ("<i4", -1, 300, True),
        ("<i4", -1, None, True),
        ("<u4", 2**31, None, True),
        ("<i8", 2**31, None, True),
        ("<i8", -(2**40), 300, True),
        ("<i8", 2**31 - 1, None, False),
    ],
)
def test_ids_outside_the_vocabulary_are_refused_when_they_are_read(
    tmp_path: Path, dtype: str, bad: int, vocab_size: int | None, refused: bool
) -> None:
    npy(tmp_path / "a.npy", np.zeros(5), dtype)
    npy(tmp_path / "b.npy", [1, 2, 3, bad, 4], dtype)
    stream, _ = open_tokens(tmp_path, vocab_size)
    assert stream.read(0, 8).tolist() == [0] * 5 + [1, 2, 3]
    assert stream.read(5, 7).tolist() == [1, 2]
    if not refused:
        assert stream.read(8, 9).tolist() == [bad]
        return
    with pytest.raises(DataError, match=f"b.npy' has the id {bad} at token 3, and the vocabulary has"):
        stream.read(2, 10)


def test_partial_reads_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux reads at most 2 GiB at a time."""

    class InPieces(FileIO):
        def readinto(self, buffer: memoryview) -> int:
            return super().readinto(buffer[:7])

    stream = open_tokens(nanogpt(tmp_path / "a.bin", IDS))[0]
    monkeypatch.setattr(Path, "open", lambda path, *_, **__: InPieces(path))
    np.testing.assert_array_equal(stream.read(3, 900), IDS[3:900])


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokens.bin")
    with within_budget(), pytest.raises(DataError, match=r"tokens\.bin' is not a regular file"):
        token_file(tmp_path / "tokens.bin")


def test_a_file_that_shrinks_raises_an_error(tmp_path: Path) -> None:
    path = nanogpt(tmp_path / "a.bin", IDS)
    stream, _ = open_tokens(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"a.bin' was truncated after it was opened"):
        stream.read(45, 55)
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read .*a.bin'"):
        stream.read(0, 10)


def test_a_fingerprint_depends_on_the_tokens_but_not_on_the_names(tmp_path: Path) -> None:
    def fingerprint(name: str, ids: np.ndarray, at: slice = slice(None)) -> str:
        stream = open_tokens(nanogpt(tmp_path / name, ids))[0]
        return stream.part(*at.indices(len(stream))[:2]).fingerprint

    changed = IDS.copy()
    changed[500] += 1
    first = fingerprint("a.bin", IDS)
    assert first == fingerprint("b.bin", IDS)
    others = [
        fingerprint("a.bin", changed),
        fingerprint("a.bin", IDS[:-1]),
        fingerprint("a.bin", IDS, slice(0, 900)),
        fingerprint("a.bin", IDS, slice(100, 1000)),
    ]
    assert len({first, *others}) == 5


def test_a_fingerprint_of_a_large_stream_samples_all_of_it(tmp_path: Path) -> None:
    ids = np.zeros(3_000_000, np.uint16)
    fingerprints = set()
    for changed in (slice(0), slice(0, 1), slice(1_500_000, 1_520_000), slice(-1, None)):
        ids[:] = 0
        ids[changed] = 1
        fingerprints.add(open_tokens(nanogpt(tmp_path / "a.bin", ids))[0].fingerprint)
    assert len(fingerprints) == 4


def test_token_sources(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "main.py").write_text("print()\n")
    (tmp_path / "code" / "firmware.bin").write_bytes(b"123")
    assert not is_token_source(tmp_path / "code")
    assert not is_token_source(tmp_path / "code" / "*")
    assert not is_token_source(tmp_path / "code" / "main.py")
    assert is_token_source(tmp_path / "code" / "*.bin")
    (tmp_path / "nanogpt").mkdir()
    nanogpt(tmp_path / "nanogpt" / "train.bin", IDS)
    (tmp_path / "nanogpt" / "prepare.py").write_text("print()\n")
    assert is_token_source(tmp_path / "nanogpt")
    assert is_token_source(llmc(tmp_path / "shard", IDS))
    with pytest.raises(DataError, match="no file matches"):
        is_token_source(tmp_path / "*.nothing")
    with pytest.raises(DataError, match="does not exist"):
        is_token_source(tmp_path / "nothing")

"""Compressed files: equal to their content, and bounded."""

from __future__ import annotations

import gzip
import io
import lzma
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.refusals import within_budget

from bridge import byte_tokenizer
from gpt2_jax.data import DataError, compression, open_data
from gpt2_jax.data.compression import open_stream
from gpt2_jax.data.text.documents import find_documents

CONTENT = "".join(f"line {i}, naïve\n" for i in range(40_000)).encode()


def zstd(data: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.compress(data, codec="zstd", asbytes=True)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_stream_is_the_content(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](CONTENT))
    with open_stream(path) as stream:
        assert stream.readline() == b"line 0, na\xc3\xafve\n"
        assert stream.read() == CONTENT[15:]
        assert stream.position == path.stat().st_size


@pytest.mark.parametrize("suffix", COMPRESS)
def test_several_compressed_parts_are_one_content(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](CONTENT) + COMPRESS[suffix](b"the end"))
    with open_stream(path) as stream:
        assert stream.read() == CONTENT + b"the end"


def test_an_uncompressed_file_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(gzip.compress(CONTENT))
    with open_stream(tmp_path / "text.txt") as stream:
        assert stream.read() == gzip.compress(CONTENT)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_text_is_encoded_as_the_text(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"text.txt{suffix}").write_bytes(COMPRESS[suffix](CONTENT))
    data = open_data(tmp_path / f"text.txt{suffix}", tokenizer="bytes", validation_fraction=0, cache=tmp_path / "cache")
    np.testing.assert_array_equal(data.train.read(0, len(data.train)), [*CONTENT, byte_tokenizer().eos_token_ids[0]])


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "not compressed"])
def test_a_damaged_file_is_refused(tmp_path: Path, suffix: str, damage: str) -> None:
    whole = COMPRESS[suffix](CONTENT)
    path = tmp_path / f"text.txt{suffix}"
    damaged = {
        "truncated": whole[: len(whole) // 2],
        "flipped": whole[:50] + bytes([whole[50] ^ 255]) + whole[51:],
        "empty": b" " * 10,
        "not compressed": CONTENT,
    }
    if (suffix, damage) == (".zst", "flipped"):
        pytest.skip("pyarrow writes Zstandard without checksums")
    path.write_bytes(damaged[damage])
    with within_budget(), pytest.raises(DataError, match=r"text\.txt.*cannot be decompressed"), open_stream(path) as s:
        while s.read(2**18):
            pass


def tar_of(name: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(CONTENT)
        archive.addfile(member, io.BytesIO(CONTENT))
    return buffer.getvalue()


def zip_of(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, CONTENT)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("inner", "kind"),
    [(gzip.compress(b"x"), "gzip"), (lzma.compress(b"x"), "xz"), (tar_of("a"), "tar"), (zip_of("a"), "zip")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_archive_inside_is_refused(tmp_path: Path, inner: bytes, kind: str) -> None:
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(inner))
    with pytest.raises(DataError, match=rf"data\.jsonl\.gz' contains a {kind} archive; extract it"):
        open_data(tmp_path / "data.jsonl.gz", tokenizer="bytes", cache=tmp_path / "cache")


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_a_bomb_is_refused(tmp_path: Path, suffix: str, kind: str) -> None:
    line = b'{"text": "%s"}\n' % (b"a" * 2000) if kind == "jsonl" else b"text" * 500 + b"\n"
    first = b"" if kind == "jsonl" else b"text\n"
    (tmp_path / f"bomb.{kind}{suffix}").write_bytes(COMPRESS[suffix](first + line * (2**24 // len(line))))
    expected = "more than 200 times its size"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError, match=expected):
        patch.setattr(compression, "EXPANSION_CHECKED_FROM", 2**20)  # so that little is encoded before it is found
        open_data(tmp_path / f"bomb.{kind}{suffix}", tokenizer="bytes", cache=tmp_path / "cache")
    assert [*(tmp_path / "cache").glob("tokens-*")] == []


def test_a_line_without_end_is_refused_within_the_budget(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(97, 123, 2**20, np.uint8).tobytes()
    with gzip.open(tmp_path / "data.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(b'{"text": "fine"}\n{"text": "')
        for _ in range(24):
            file.write(noise)
    with within_budget(), pytest.raises(DataError, match=r"data\.jsonl\.gz', line 2: has more than 16777216 bytes"):
        open_data(tmp_path / "data.jsonl.gz", tokenizer="bytes", cache=tmp_path / "cache")


def test_xz_that_needs_much_memory_is_refused(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**27 + 2**26}]
    (tmp_path / "text.txt.xz").write_bytes(lzma.compress(CONTENT, filters=filters))
    with pytest.raises(DataError, match="cannot be decompressed: 'Memory usage limit exceeded'"):
        find_documents(tmp_path / "text.txt.xz").files[0].is_text()


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("a.txt.zst", "a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(DataError, match=rf"{name}': .* needs pyarrow; install it: .*gpt2-bridge\[data\]"):
            open_data(tmp_path / name, tokenizer="bytes", cache=tmp_path / "cache")

"""Finding documents, and splitting them into blocks without splitting a token."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest
import tiktoken

from bridge.tokenizers.byte_level_bpe import SPELLINGS_OF_WORDS
from gpt2_jax.data import DataError
from gpt2_jax.data.text import documents as documents_module
from gpt2_jax.data.text.bpe_training import train_bpe
from gpt2_jax.data.text.documents import find_documents

# Characters of all classes of regular expressions: letters, digits, marks, all kinds of white space, and those that
# are white space in Python but not in Rust (U+001C ... U+001F).
PARTS = [
    *"ab'sdmtZé漢9٣.;({_-",
    "ll",
    "'re",
    "e\u0301",
    "🙂",
    *" \n\t\r\x0b\x0c\x1c\x1f\x85\xa0\u2028\u3000",
    "  ",
    "\n\n",
]


def random_text(length: int, seed: int) -> str:
    return "".join(random.Random(seed).choices(PARTS, k=length))


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return path


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "BLOCK_BYTES", 16)
    monkeypatch.setattr(documents_module, "MAX_BLOCK_BYTES", 256)


@pytest.mark.parametrize("pattern", SPELLINGS_OF_WORDS, ids=["ours", "openai", "tiktoken"])
def test_blocks_give_the_tokens_of_the_whole(small_blocks: None, tmp_path: Path, pattern: str) -> None:
    trained = train_bpe([random_text(3000, seed) for seed in range(3)], 600)
    encoding = tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=dict(trained.ranks), special_tokens={})
    assert max(map(len, trained.ranks)) > 3
    for seed in range(40):
        whole = random_text(400, seed)
        (document,) = find_documents(write(tmp_path / "text.txt", whole)).files
        blocks = list(document.blocks())
        assert len(blocks) > 5
        assert "".join(blocks) == whole
        assert [i for block in blocks for i in encoding.encode_to_numpy(block)] == encoding.encode_ordinary(whole)


def test_a_text_without_a_safe_position_is_split_anyway(small_blocks: None, tmp_path: Path) -> None:
    whole = "é" * 1000
    (document,) = find_documents(write(tmp_path / "text.txt", whole)).files
    blocks = list(document.blocks())
    assert "".join(blocks) == whole
    assert max(map(len, blocks)) <= 256 + 16


def test_line_ends_and_byte_order_marks_inside_a_text_are_kept(tmp_path: Path) -> None:
    whole = "one\r\n\ufefftwo\rthree\n"
    (document,) = find_documents(write(tmp_path / "text.txt", whole)).files
    assert "".join(document.blocks()) == whole


def test_a_single_file_must_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes("naïve".encode("latin-1"))
    (document,) = find_documents(tmp_path / "text.txt").files
    with pytest.raises(DataError, match=r"text.txt' is not UTF-8"):
        list(document.blocks())
    (tmp_path / "text.txt").write_bytes("naï".encode()[:-1])
    with pytest.raises(DataError, match=r"text.txt' is not UTF-8"):
        list(document.blocks())


def test_a_directory_skips_files_that_are_not_text(tmp_path: Path) -> None:
    for name in ("a.txt", "sub/b.py", "sub/deep/c.md"):
        write(tmp_path / name, f"this is {name}")
    write(tmp_path / ".hidden", "hidden")
    write(tmp_path / ".git/config", "hidden")
    write(tmp_path / "empty.txt", "")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    (tmp_path / "zeros").write_bytes(b"abc\0def")
    os.symlink(tmp_path / "nowhere", tmp_path / "broken")
    found = find_documents(tmp_path)
    assert {d.name for d in found.files} == {"a.txt", "sub/b.py", "sub/deep/c.md", "picture.png", "zeros"}
    assert {d.name for d in found.readable()} == {"a.txt", "sub/b.py", "sub/deep/c.md"}
    assert {d.size for d in found.readable()} == {len("this is a.txt"), len("this is sub/b.py"), 21}


def test_a_directory_skips_the_runs_in_it(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a")
    before = find_documents(tmp_path)
    for name in ("run.json", "metrics.jsonl", "export/merges.txt"):
        write(tmp_path / "runs/first" / name, "written by a run")
    assert find_documents(tmp_path) == before


def test_documents_are_ordered_by_a_hash_of_their_names(tmp_path: Path) -> None:
    names = [f"{i}.txt" for i in range(20)]
    for name in names:
        write(tmp_path / name, name)
    ordered = [d.name for d in find_documents(tmp_path).files]
    assert ordered == sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert ordered != sorted(names)


def test_documents_of_a_glob_are_named_relative_to_its_fixed_part(tmp_path: Path) -> None:
    for name in ("src/a/x.py", "src/b/y.py", "src/b/y.txt", "src/z.py"):
        write(tmp_path / name, name)
    assert {d.name for d in find_documents(tmp_path / "src/**/*.py").files} == {"a/x.py", "b/y.py", "z.py"}
    assert {d.name for d in find_documents(tmp_path / "src/*/*").files} == {"a/x.py", "b/y.py", "b/y.txt"}


def test_a_directory_and_a_glob_of_it_have_the_same_names(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        write(tmp_path / name, name)
    assert find_documents(tmp_path).files == find_documents(tmp_path / "*.txt").files


def test_a_glob_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "a")
    monkeypatch.chdir(tmp_path)
    (by_glob,) = find_documents("*.txt").files
    (by_name,) = find_documents("a.txt").files
    monkeypatch.chdir("/")
    assert list(by_glob.blocks()) == list(by_name.blocks()) == ["a"]


def test_the_standard_library_is_that_of_the_interpreter() -> None:
    found = find_documents("stdlib")
    names = {d.name for d in found.files}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert all(name.endswith(".py") for name in names)
    assert not [name for name in names if {"site-packages", "test", "tests"} & set(name.split("/")[:-1])]
    assert Path(argparse_file()).stat().st_size in {d.size for d in found.files if d.name == "argparse.py"}


def argparse_file() -> str:
    import argparse

    return argparse.__file__


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing.txt", "does not exist"),
        ("*.nothing", "no file matches"),
        ("", "has no text"),
        ("empty.txt", "no text"),
    ],
)
def test_a_source_without_documents_is_an_error(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=message):
        find_documents(tmp_path / source)


def test_an_empty_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="empty name"):
        find_documents("")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_directory_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "sub/b.txt", "b")
    (tmp_path / "sub").chmod(0)
    with pytest.raises(DataError, match="cannot read"):
        find_documents(tmp_path)


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfone two", b"one two"])
def test_a_byte_order_mark_at_the_start_is_not_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    (document,) = find_documents(tmp_path / "text.txt").files
    assert document.is_text() and "".join(document.blocks()) == "one two"

"""The token cache: equal to encoding the whole text, written once, and atomically."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.refusals import within_budget
from support.tokenizers_for_tests import of_tiktoken

from bridge import (
    BridgeError,
    CheckpointError,
    TokenizerError,
    byte_tokenizer,
    character_tokenizer,
    tokenizer_fingerprint,
)
from bridge.tokenizers.byte_level_bpe import ByteLevelBPE
from bridge.tokenizers.tokenizer import AddedToken, SpecialTokens, Tokenizer
from gpt2_jax.data import DataError, TokenStream, cache_directory, open_data
from gpt2_jax.data.text import documents as documents_module
from gpt2_jax.data.text.documents import find_documents
from gpt2_jax.data.text.tokenizers import make_tokenizer
from gpt2_jax.data.tokens import cache as token_cache
from gpt2_jax.data.tokens.cache import cached_text

LINES = "".join(f"The line {i} is like line {i // 2}.\n" for i in range(300))
END = 256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three documents, one file that is not text, and an empty one."""
    (tmp_path / "texts").mkdir()
    for name in ("one", "two", "three"):
        (tmp_path / "texts" / name).write_text(f"{name}: {LINES}")
    (tmp_path / "texts" / "binary").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "texts" / "empty").touch()
    return tmp_path / "texts"


def read_all(stream: TokenStream) -> list[int]:
    return stream.read(0, len(stream)).tolist()


def encoded(source: Path, encoding: Tokenizer | None = None, cache: Path | None = None) -> TokenStream:
    cache = cache or source.parent / "cache"
    return cached_text(find_documents(source), encoding or byte_tokenizer(), cache=cache).tokens


def only_directory(cache: Path) -> Path:
    (directory,) = cache.iterdir()
    return directory


def test_documents_end_with_the_end_of_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "BLOCK_BYTES", 1000)  # many blocks are encoded at the same time
    documents = find_documents(folder)
    expected: list[int] = []
    ends = []
    for document in documents.readable():
        expected += [*document.path.read_bytes(), END]
        ends.append(len(expected))
    stream = encoded(folder)
    assert read_all(stream) == expected
    assert stream.document_ends is not None and stream.document_ends.tolist() == ends
    assert len(ends) == 3


def test_the_sidecar_describes_the_files_beside_it(folder: Path) -> None:
    encoding = byte_tokenizer()
    stream = encoded(folder, encoding)
    directory = only_directory(folder.parent / "cache")
    about = json.loads((directory / "tokens.json").read_text())
    ids = np.fromfile(directory / "tokens.bin", about["dtype"])
    text_bytes = sum(d.size for d in find_documents(folder).readable())
    assert about == {
        "format": 1,
        "source": str(folder),
        "tokenizer": {"name": encoding.name, "fingerprint": tokenizer_fingerprint(encoding)},
        "dtype": "<u2",
        "tokens": len(stream),
        "documents": 3,
        "skipped": 1,
        "bytes": text_bytes,
        "characters": text_bytes,
        "sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
        "document_ends_sha256": hashlib.sha256((directory / "document_ends.bin").read_bytes()).hexdigest(),
    }
    assert ids.tolist() == read_all(stream)
    assert np.fromfile(directory / "document_ends.bin", "<i8").tolist()[-1] == len(ids)


def test_a_tokenizer_without_an_end_of_text_adds_nothing(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("naïve")
    stream = encoded(tmp_path / "text.txt", character_tokenizer("naïve"))
    assert read_all(stream) == ["aenvï".index(c) for c in "naïve"]


def test_a_special_token_in_a_text_is_matched_unless_it_is_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a<|endoftext|>b")
    documents = find_documents(tmp_path / "text.txt")
    for policy, ids in (("match", [97, END, 98, END]), ("as_text", [*b"a<|endoftext|>b", END])):
        text = cached_text(documents, byte_tokenizer(), special_tokens=policy, cache=tmp_path / "cache")
        assert read_all(text.tokens) == ids
    assert len([*(tmp_path / "cache").iterdir()]) == 2, "each has its own place in the cache"
    with pytest.raises(TokenizerError, match="contains the token"):
        cached_text(documents, byte_tokenizer(), special_tokens="error", cache=tmp_path / "cache")


def test_documents_have_the_tokens_that_surround_texts(tmp_path: Path) -> None:
    """A beginning-of-sequence token, added once for each document, and one end of sequence."""
    ranks = byte_tokenizer().ranks
    added = [AddedToken("<s>", 256), AddedToken("</s>", 257)]
    for after in ((), (257,)):
        tokenizer = ByteLevelBPE("b", ranks, added, SpecialTokens("<s>", "</s>"), around=((256,), after))
        (tmp_path / "texts").mkdir(exist_ok=True)
        for name in ("a", "b"):
            (tmp_path / "texts" / name).write_text(name)
        ids = read_all(encoded(tmp_path / "texts", tokenizer, tmp_path / "cache"))
        assert ids in ([256, 97, 257, 256, 98, 257], [256, 98, 257, 256, 97, 257]), "in a shuffled order"


def test_a_tokenizer_that_inserts_a_space_gets_whole_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "BLOCK_BYTES", 64)
    text = "the quick brown fox\n" * 30
    (tmp_path / "text.txt").write_text(text)
    tokenizer = ByteLevelBPE("b", byte_tokenizer().ranks, add_prefix_space=True)
    assert read_all(encoded(tmp_path / "text.txt", tokenizer)) == [*b" ", *text.encode()]


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path: Path) -> None:
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 70_000}
    encoding = of_tiktoken("large", pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens={})
    (tmp_path / "text.txt").write_text("ab a")
    assert read_all(encoded(tmp_path / "text.txt", encoding)) == [70_000, 32, 97]
    directory = only_directory(tmp_path / "cache")
    assert not (directory / "tokens.bin").exists()  # other programs would read it as 16 bits
    assert (directory / "tokens.uint32").stat().st_size == 12


class Counting:
    """A tokenizer that counts how often it is used."""

    def __init__(self) -> None:
        self.calls = 0
        self.encoding = byte_tokenizer()

    def __getattr__(self, name: str) -> object:
        return getattr(self.encoding, name)

    def encode_to_numpy(self, text: str, **options: Any) -> np.ndarray:
        self.calls += 1
        return self.encoding.encode_to_numpy(text, **options)


def test_text_is_encoded_once_and_again_after_a_change(folder: Path) -> None:
    counting = Counting()
    first = encoded(folder, counting)  # type: ignore[arg-type]
    once = counting.calls
    assert once and encoded(folder, counting) == first  # type: ignore[arg-type]
    assert counting.calls == once
    changed = folder / "one"
    os.utime(changed, ns=(0, changed.stat().st_mtime_ns + 1))
    encoded(folder, counting)  # type: ignore[arg-type]
    assert counting.calls == 2 * once
    changed.rename(folder / "new name")
    encoded(folder, counting)  # type: ignore[arg-type]
    assert counting.calls == 3 * once


def test_another_tokenizer_has_another_directory(folder: Path) -> None:
    encoded(folder)
    encoded(folder, character_tokenizer(LINES + "onetwothree:"))
    assert len(list((folder.parent / "cache").iterdir())) == 2


def change_sidecar(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        about = json.loads((directory / "tokens.json").read_text())
        (directory / "tokens.json").write_text(json.dumps({**about, **changes}))

    return change


def replace_file(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(content) and None


def flip(name: str, at: int) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        content = bytearray((directory / name).read_bytes())
        content[at] ^= 1
        (directory / name).write_bytes(content)

    return change


def reseal(name: str, ends: list[int]) -> Callable[[Path], None]:
    """Replace the document ends and update the hashes, as an attacker can."""

    def change(directory: Path) -> None:
        content = np.array(ends, "<i8").tobytes()
        (directory / name).write_bytes(content)
        change_sidecar(documents=len(ends), document_ends_sha256=hashlib.sha256(content).hexdigest())(directory)

    return change


def put_instead(name: str, make: Callable[[Path, Path], object]) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).rename(directory / "elsewhere")
        make(directory / "elsewhere", directory / name)

    return change


def link(target: Path, name: Path) -> None:
    name.symlink_to(target)


def pipe(target: Path, name: Path) -> None:
    os.mkfifo(name)


def folder_instead(target: Path, name: Path) -> None:
    name.mkdir()


COUNTS: list[Any] = ["3", True, 3.0, -1, None, [3], 2**70, 10**400]
DAMAGE: dict[str, Callable[[Path], None]] = {
    "tokens truncated": replace_file("tokens.bin", b"12"),
    "tokens missing": lambda directory: (directory / "tokens.bin").unlink(),
    "a token flipped": flip("tokens.bin", 0),
    "the last token flipped": flip("tokens.bin", -1),
    "an end flipped": flip("document_ends.bin", 0),
    "no ends": replace_file("document_ends.bin", b""),
    "ends of zeros": replace_file("document_ends.bin", bytes(24)),
    "ends decrease": reseal("document_ends.bin", [20_000, 10_000, 24_000]),
    "ends start below zero": reseal("document_ends.bin", [-1, 10_000, 24_000]),
    "ends beyond the last token": reseal("document_ends.bin", [1, 2, 2**62]),
    "ends before the last token": reseal("document_ends.bin", [1, 2, 3]),
    "one end": reseal("document_ends.bin", [3]),
    "sidecar missing": lambda directory: (directory / "tokens.json").unlink(),
    "sidecar empty": replace_file("tokens.json", b"{}"),
    "sidecar truncated": replace_file("tokens.json", b"{"),
    "sidecar a list": replace_file("tokens.json", b"[1]"),
    "sidecar deep": replace_file("tokens.json", b"[" * 200_000),
    "sidecar of 30 MB": replace_file("tokens.json", b"[" + b"1," * 15_000_000 + b"1]"),
    "sidecar not UTF-8": replace_file("tokens.json", b"\xff{}"),
    "sidecar of an earlier version": change_sidecar(document_ends_sha256=None),
    **{f"{name} {str(value)[:9]}": change_sidecar(**{name: value})
       for name in ("format", "tokens", "documents", "skipped") for value in COUNTS
       if not (name == "skipped" and value == 3)},
    **{f"dtype {value}": change_sidecar(dtype=value) for value in ("object", "<f8", "<u4", "", None, ["<u2"], 2)},
    **{f"sha256 {value}": change_sidecar(sha256=value) for value in ("", "0" * 64, None, 3)},
    **{f"{name} is a {make.__name__}": put_instead(name, make)
       for name in ("tokens.json", "tokens.bin", "document_ends.bin") for make in (link, pipe, folder_instead)},
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_rebuilt_and_refused_as_data(folder: Path, damage: str) -> None:
    before = read_all(encoded(folder))
    directory = only_directory(folder.parent / "cache")
    DAMAGE[damage](directory)
    with within_budget():
        assert token_cache.open_cached(directory) is None
    if is_foreign := " is a " in damage:  # written by another program, so it is kept
        with pytest.raises(CheckpointError, match="not overwritten, because it holds files"):
            encoded(folder)
    if damage != "sidecar missing":  # without it, it is not a directory of the cache
        with within_budget(), pytest.raises(DataError, match="is damaged or was written by an earlier version"):
            open_data(directory)
    if not is_foreign:
        assert read_all(encoded(folder)) == before


def test_a_changed_cached_tokenizer_is_rebuilt(folder: Path) -> None:
    documents = find_documents(folder)
    made = make_tokenizer("characters", documents, cache=folder.parent / "cache")
    kept = only_directory(folder.parent / "cache") / "tokenizer.json"
    content = kept.read_text()
    kept.write_text(content.replace('"e"', '"\u00e9"'))  # another character with the same id
    again = make_tokenizer("characters", documents, cache=folder.parent / "cache")
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(made)
    assert kept.read_text() == content


def test_verifying_reports_progress(folder: Path) -> None:
    encoded(folder)
    seen: list[tuple[str, int, int]] = []
    cache = folder.parent / "cache"
    stream = cached_text(find_documents(folder), byte_tokenizer(), cache=cache, progress=lambda *a: seen.append(a))
    assert seen[-1] == ("verifying tokens", 2 * len(stream.tokens), 2 * len(stream.tokens))


def test_a_failed_encoding_leaves_nothing(folder: Path) -> None:
    with pytest.raises(TokenizerError, match="has no character"):
        encoded(folder, character_tokenizer("abc"))
    cache = folder.parent / "cache"
    assert not cache.exists() or not list(cache.iterdir())


def test_an_interrupted_encoding_leaves_nothing_and_ends_its_threads(folder: Path) -> None:
    def interrupt(doing: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_text(find_documents(folder), byte_tokenizer(), cache=folder.parent / "cache", progress=interrupt)
    assert not (folder.parent / "cache").exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tokenise")]


def test_two_processes_may_write_the_same_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process finishes while this one writes. This one then uses the existing files."""
    write = token_cache.write_tokens
    streams = []

    def overtaken(*arguments: object) -> None:
        write(*arguments)  # type: ignore[arg-type]
        monkeypatch.setattr(token_cache, "write_tokens", write)
        streams.append(encoded(folder))

    monkeypatch.setattr(token_cache, "write_tokens", overtaken)
    streams.append(encoded(folder))
    assert read_all(streams[0]) == read_all(streams[1])
    assert streams[0].files == streams[1].files
    only_directory(folder.parent / "cache")


def test_progress_counts_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "BLOCK_BYTES", 1000)
    seen: list[tuple[str, int, int]] = []
    documents = find_documents(folder)
    cached_text(documents, byte_tokenizer(), cache=folder.parent / "cache", progress=lambda *about: seen.append(about))
    done = [bytes_done for _, bytes_done, _ in seen]
    assert done == sorted(done) and len(done) > 10
    assert done[-1] == sum(d.size for d in documents.readable())
    assert {(doing, total) for doing, _, total in seen} == {("tokenising", documents.size)}


def test_a_source_without_any_text_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="none of its 2 files is UTF-8"):
        encoded(tmp_path, cache=tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_an_error(folder: Path) -> None:
    (folder.parent / "cache").write_text("a file")
    with pytest.raises(BridgeError, match=r"cannot write .*cache"):
        encoded(folder)


def test_the_default_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "gpt2-bridge"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "gpt2-bridge"
    assert cache_directory(tmp_path / "x") == tmp_path / "x"


def test_files_of_equal_name_size_and_time_have_different_keys(tmp_path: Path) -> None:
    """Archives may give all files the same time."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "input.txt").write_text(name * 10)
        os.utime(tmp_path / name / "input.txt", (1, 1))
    one, other = (encoded(tmp_path / name / "input.txt", cache=tmp_path / "cache") for name in ("a", "b"))
    assert one.fingerprint != other.fingerprint


def test_a_cache_may_be_moved(folder: Path) -> None:
    before = encoded(folder)
    moved = folder.parent / "moved"
    shutil.move(folder.parent / "cache", moved)
    after = encoded(folder, cache=moved)
    assert after.fingerprint == before.fingerprint
    assert len(list(moved.iterdir())) == 1


def test_a_file_without_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"text.txt' is not UTF-8"):
        encoded(tmp_path / "text.txt")

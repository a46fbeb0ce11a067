"""Manifests: every change of a file in a committed directory raises an error that names the file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.refusals import within_budget

from bridge import CheckpointError
from bridge.storage.manifest import MANIFEST, _rendered, about, commit, recorded, verify

ABOUT = {"step": 7, "val_loss": 1.25, "config": {"n_layer": 2}, "none": None}
FILES = {"a": b"first", "b/c": b"x" * 70_000, "b/d/e": b"", "b/f": b"first"}


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / "committed" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "committed" / name).write_bytes(content)
    commit(tmp_path / "committed", ABOUT)
    return tmp_path / "committed"


def test_an_unchanged_directory_is_valid(committed: Path) -> None:
    assert verify(committed) == about(committed) == ABOUT
    committed.rename(committed.with_name("moved"))
    assert verify(committed.with_name("moved")) == ABOUT


def flip_every_byte(data: bytes) -> list[bytes]:
    places = range(len(data)) if len(data) < 2000 else range(0, len(data), 997)
    return [data[:k] + bytes([data[k] ^ (1 << k % 8)]) + data[k + 1 :] for k in places]


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_every_change_of_a_file_is_noticed(committed: Path, name: str) -> None:
    file = committed / name
    kept = file.read_bytes()
    changes = [*flip_every_byte(kept), kept[:-1], kept + b"\0", kept[: len(kept) // 2], b"\0" * len(kept), b"other"]
    for changed in [c for c in changes if c != kept]:
        file.write_bytes(changed)
        with pytest.raises(CheckpointError) as refused:
            verify(committed)
        assert file.name in str(refused.value)
    file.unlink()
    with pytest.raises(CheckpointError, match="missing" if name != MANIFEST else "has no manifest"):
        verify(committed)
    file.write_bytes(kept)
    assert verify(committed) == ABOUT


def test_exchanged_files_are_noticed(committed: Path) -> None:
    (committed / "a").rename(committed / "x")
    (committed / "b" / "c").rename(committed / "a")
    (committed / "x").rename(committed / "b" / "c")
    with pytest.raises(CheckpointError):
        verify(committed)


def test_the_manifest_of_another_directory_is_noticed(committed: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(committed, tmp_path / "other"))
    (other / "a").write_bytes(b"other")
    commit(other, {**ABOUT, "step": 8})
    shutil.copy(other / MANIFEST, committed / MANIFEST)
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        verify(committed)


def change_about(content: dict[str, Any]) -> Any:
    return {**content, "about": {**content["about"], "val_loss": 0.5}}


@pytest.mark.parametrize(
    "change",
    [
        change_about,
        lambda content: {k: v for k, v in content.items() if k != "seal"},
        lambda content: {**content, "more": 1},
        lambda content: [content],
        lambda content: None,
        lambda content: {**content, "files": []},
    ],
)
def test_a_changed_manifest_is_noticed(committed: Path, change: Callable[[Any], Any]) -> None:
    manifest = committed / MANIFEST
    manifest.write_text(json.dumps(change(json.loads(manifest.read_text()))))
    for read in (about, verify):
        with pytest.raises(CheckpointError, match="was changed after it was written"):
            read(committed)


def entry(name: str = "a", **changes: Any) -> dict[str, Any]:
    return {"about": {}, "files": {name: {"bytes": 5, "sha256": "0" * 64, **changes}}}


FOREIGN: dict[str, Any] = {
    "about a list": {"about": [1], "files": {}},
    "files a list": {"about": {}, "files": []},
    "a number for a file": {"about": {}, "files": {"a": 3}},
    **{f"{str(size)[:9]} bytes": entry(bytes=size) for size in ("5", True, 5.0, None, -1, 2**70, 10**400)},
    **{f"sha256 {str(value)[:9]}": entry(sha256=value) for value in ("x", "", None, 3, "0" * 63, "0" * 64 + "\n")},
    "another field": entry(mode=3),
    **{f"name {name!r}": entry(name)
       for name in ("../a", "/etc/passwd", "b/../../a", "a\0", "..\\a", "C:\\a", "", ".", "b//a", "b/./a")},
}  # fmt: skip


def as_json_renders(content: dict[str, Any]) -> bytes:
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**content, "seal": seal}, indent=1) + "\n").encode()


@pytest.mark.parametrize("name", FOREIGN)
def test_an_invalid_manifest_with_a_valid_seal_is_refused(committed: Path, name: str) -> None:
    (committed / MANIFEST).write_bytes(as_json_renders(FOREIGN[name]))
    for read in (about, verify):
        with within_budget(), pytest.raises(CheckpointError, match="was changed after it was written") as error:
            read(committed)
        assert str(error.value).isprintable()


MIB = 2**20
LARGE = {
    "60 MB": b'{"about": {}, "files": {' + b'"a": {"bytes": 5, "sha256": "x"}, ' * (60 * MIB // 35),
    "brackets": b"[" * (4 * MIB - 1),
    "lists": b"[" + b"[]," * (MIB - 9) + b"[]]",
    "objects": b'{"about": [' + b'{"a":1},' * (MIB // 2 - 9) + b"{}]}",
    "a long number": b'{"about": {"step": ' + b"1" * (3 * MIB) + b"}}",
    "a large about": as_json_renders({"about": {"x": ["y" * 50] * 40_000}, "files": {}}),
    "an about of numbers": as_json_renders({"about": {"x": [1] * 50_000}, "files": {}}),
    "a long text": as_json_renders({"about": {"x": "y" * 3 * MIB}, "files": {}}),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_manifest_is_refused_quickly(committed: Path, name: str) -> None:
    (committed / MANIFEST).write_bytes(LARGE[name])
    for read in (about, verify):
        with within_budget(), pytest.raises(CheckpointError, match=r"manifest\.json"):
            read(committed)


@pytest.mark.parametrize("files", [{}, {"a": 1}, {"a": 1, 'b/\u00fc \n"files": {}': 2}])
def test_a_manifest_is_rendered_like_json_dumps(files: dict[str, int]) -> None:
    content = {
        "about": {**ABOUT, "text": '"files": {}'},
        "files": {name: {"bytes": size, "sha256": "0" * 64} for name, size in files.items()},
    }
    assert _rendered(content) == as_json_renders(content)


def test_a_manifest_of_ten_thousand_files_is_read_quickly(tmp_path: Path) -> None:
    files = {
        f"state/ocdbt.process_{number}/d/{number:032x}": {"bytes": number, "sha256": f"{number:064x}"}
        for number in range(10_000)
    }
    (tmp_path / MANIFEST).write_bytes(as_json_renders({"about": ABOUT, "files": files}))
    with within_budget():
        assert about(tmp_path) == ABOUT


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/dev/zero"), os.mkfifo, os.mkdir])
def test_a_manifest_that_is_not_a_regular_file_is_refused(committed: Path, make: Callable[[Path], None]) -> None:
    (committed / MANIFEST).unlink()
    make(committed / MANIFEST)
    for read in (about, verify):
        with within_budget(), pytest.raises(CheckpointError):
            read(committed)


def test_an_extra_file_is_noticed(committed: Path) -> None:
    (committed / "b" / "more").write_bytes(b"")
    with pytest.raises(CheckpointError, match="more' is not in the manifest"):
        verify(committed)


@pytest.mark.parametrize("make", [lambda path: os.symlink("/etc/hostname", path), os.mkfifo], ids=["link", "pipe"])
@pytest.mark.parametrize("name", ["a", "b/more"])
def test_special_files_are_refused_and_not_opened(committed: Path, make: Callable[[Path], None], name: str) -> None:
    (committed / name).unlink(missing_ok=True)
    make(committed / name)
    for act in (verify, lambda directory: commit(directory, ABOUT)):
        with pytest.raises(CheckpointError, match="is a link or a special file"):
            act(committed)


def test_a_linked_directory_is_refused(committed: Path, tmp_path: Path) -> None:
    shutil.move(committed / "b", tmp_path / "elsewhere")
    (committed / "b").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link or a special file"):
        verify(committed)


def test_all_files_are_flushed_before_the_manifest_is_written(committed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (committed / MANIFEST).unlink()
    flushed: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        "bridge.storage.manifest.flush_to_disk",
        lambda path: flushed.append((path.relative_to(committed).as_posix(), (committed / MANIFEST).exists())),
    )
    commit(committed, ABOUT)
    files, rest = flushed[: len(FILES)], flushed[len(FILES) :]
    assert files == [(name, False) for name in sorted(FILES)]
    assert rest[0] == (MANIFEST, True)
    assert {name for name, _ in rest[1:]} == {".", "b", "b/d"}


@pytest.mark.parametrize("name", ["a/" * 40_000 + "f", "x" * 5000], ids=["folders", "characters"])
def test_a_long_name_is_refused_quickly(tmp_path: Path, name: str) -> None:
    content = {"about": {}, "files": {name: {"bytes": 1, "sha256": "0" * 64}}}
    (tmp_path / MANIFEST).write_bytes(_rendered(content))
    with within_budget():
        assert recorded(tmp_path) == frozenset()

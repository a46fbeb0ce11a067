"""A sealed directory: whatever happens to a file in it is noticed, and said by its name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridge import CheckpointError
from bridge.manifest import MANIFEST, _rendered, about, seal, verify

ABOUT = {"step": 7, "val_loss": 1.25, "config": {"n_layer": 2}, "none": None}
FILES = {"a": b"first", "b/c": b"x" * 70_000, "b/d/e": b"", "b/f": b"first"}


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / "sealed" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sealed" / name).write_bytes(content)
    seal(tmp_path / "sealed", ABOUT)
    return tmp_path / "sealed"


def test_what_is_as_it_was_says_what_it_is(sealed: Path) -> None:
    assert verify(sealed) == about(sealed) == ABOUT
    sealed.rename(sealed.with_name("moved"))
    assert verify(sealed.with_name("moved")) == ABOUT


def flip_every_byte(data: bytes) -> list[bytes]:
    places = range(len(data)) if len(data) < 2000 else range(0, len(data), 997)
    return [data[:k] + bytes([data[k] ^ (1 << k % 8)]) + data[k + 1 :] for k in places]


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_every_change_of_a_file_is_noticed(sealed: Path, name: str) -> None:
    file = sealed / name
    kept = file.read_bytes()
    changes = [*flip_every_byte(kept), kept[:-1], kept + b"\0", kept[: len(kept) // 2], b"\0" * len(kept), b"other"]
    for changed in [c for c in changes if c != kept]:
        file.write_bytes(changed)
        with pytest.raises(CheckpointError) as refused:
            verify(sealed)
        assert file.name in str(refused.value)
    file.unlink()
    with pytest.raises(CheckpointError, match="missing" if name != MANIFEST else "has no manifest"):
        verify(sealed)
    file.write_bytes(kept)
    assert verify(sealed) == ABOUT


def test_files_that_change_places_are_noticed(sealed: Path) -> None:
    (sealed / "a").rename(sealed / "x")
    (sealed / "b" / "c").rename(sealed / "a")
    (sealed / "x").rename(sealed / "b" / "c")
    with pytest.raises(CheckpointError):
        verify(sealed)


def test_another_ones_manifest_is_noticed(sealed: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(sealed, tmp_path / "other"))
    (other / "a").write_bytes(b"other")
    seal(other, {**ABOUT, "step": 8})
    shutil.copy(other / MANIFEST, sealed / MANIFEST)
    with pytest.raises(CheckpointError, match="is not as it was written"):
        verify(sealed)


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
def test_a_manifest_that_was_written_to_is_noticed(sealed: Path, change: Callable[[Any], Any]) -> None:
    manifest = sealed / MANIFEST
    manifest.write_text(json.dumps(change(json.loads(manifest.read_text()))))
    for read in (about, verify):
        with pytest.raises(CheckpointError, match="is not as it was written"):
            read(sealed)


@pytest.mark.parametrize(
    "content",
    [
        {"about": [1], "files": {}},
        {"about": {}, "files": []},
        {"about": {}, "files": {"a": 3}},
        {"about": {}, "files": {"a": {"bytes": "5", "sha256": "x"}}},
        {"about": {}, "files": {"a": {"bytes": True, "sha256": "x"}}},
    ],
)
def test_a_manifest_of_another_form_is_refused_though_it_is_sealed(sealed: Path, content: dict[str, Any]) -> None:
    (sealed / MANIFEST).write_bytes(_rendered(content))
    for read in (about, verify):
        with pytest.raises(CheckpointError, match="is not as it was written"):
            read(sealed)


def test_a_file_too_many_is_noticed(sealed: Path) -> None:
    (sealed / "b" / "more").write_bytes(b"")
    with pytest.raises(CheckpointError, match="more' is not in the manifest"):
        verify(sealed)


@pytest.mark.parametrize("make", [lambda path: os.symlink("/etc/hostname", path), os.mkfifo], ids=["link", "pipe"])
@pytest.mark.parametrize("name", ["a", "b/more"])
def test_what_is_no_file_is_refused_and_not_opened(sealed: Path, make: Callable[[Path], None], name: str) -> None:
    (sealed / name).unlink(missing_ok=True)
    make(sealed / name)
    for act in (verify, lambda directory: seal(directory, ABOUT)):
        with pytest.raises(CheckpointError, match="is a link, or no file"):
            act(sealed)


def test_a_directory_that_leads_elsewhere_is_refused(sealed: Path, tmp_path: Path) -> None:
    shutil.move(sealed / "b", tmp_path / "elsewhere")
    (sealed / "b").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link, or no file"):
        verify(sealed)


def test_all_is_on_the_disk_before_the_manifest_is_there(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sealed / MANIFEST).unlink()
    flushed: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        "bridge.manifest.flush_to_disk",
        lambda path: flushed.append((path.relative_to(sealed).as_posix(), (sealed / MANIFEST).exists())),
    )
    seal(sealed, ABOUT)
    files, rest = flushed[: len(FILES)], flushed[len(FILES) :]
    assert files == [(name, False) for name in sorted(FILES)]
    assert rest[0] == (MANIFEST, True)
    assert {name for name, _ in rest[1:]} == {".", "b", "b/d"}

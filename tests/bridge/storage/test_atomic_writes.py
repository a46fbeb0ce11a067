"""A write is complete or changes nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from support.file_trees import fill, own, tree
from support.models import huggingface_directory

import bridge
from bridge import CheckpointError
from bridge.storage.atomic_writes import Replaceable, foreign_files, new_directory, new_file, replace_files


def test_a_new_directory_appears_complete_and_alone(tmp_path: Path) -> None:
    with new_directory(tmp_path / "a" / "b" / "out") as directory:
        (directory / "new").write_text("new")
        (directory / "sub").mkdir()
        assert not (tmp_path / "a" / "b" / "out").exists()
    assert tree(tmp_path / "a" / "b") == {"out": None, "out/new": b"new", "out/sub": None}


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out")
    assert tree(tmp_path) == {"out": None, "out/new": b"new"}


def test_a_directory_with_contents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".hidden").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=r"out' exists; choose another name"):
        fill(tmp_path / "out")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("replaceable", [None, own])
def test_a_file_is_never_replaced_by_a_directory(tmp_path: Path, replaceable: Replaceable | None) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match=r"out' exists and is not a directory"):
        fill(tmp_path / "out", replaceable)
    assert tree(tmp_path) == {"out": b"mine"}


def test_a_directory_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="is a directory"), new_file(tmp_path / "out", overwrite=overwrite):
            pass
    assert tree(tmp_path) == {"out": None}


def test_a_directory_of_replaceable_files_is_replaced_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o750)
    (tmp_path / "out" / "old").write_text("old")
    fill(tmp_path / "out", own)
    assert tree(tmp_path) == {"out": None, "out/new": b"new"}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("kind", ["file", "directory", "empty directory", "link", "pipe"])
def test_a_directory_with_any_other_file_is_refused_with_a_list(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    (tmp_path / "elsewhere").write_text("mine")
    match kind:
        case "file":
            (out / "thesis").write_text("mine")
        case "directory":
            (out / "thesis" / "old").mkdir(parents=True)
        case "empty directory":
            (out / "thesis").mkdir()
        case "link":
            (out / "new").symlink_to(tmp_path / "elsewhere")
        case "pipe":
            os.mkfifo(out / "new")
    before = tree(tmp_path)
    name = {"link": "new", "pipe": "new", "file": "thesis"}.get(kind, "thesis/")
    with pytest.raises(CheckpointError, match=f"not overwritten, because it holds files .*\n  - '{name}'$"):
        fill(out, own)
    assert tree(tmp_path) == before


def test_files_in_folders_are_named_by_their_path(tmp_path: Path) -> None:
    for name in ("state/a", "state/b/c", "run/d"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(foreign_files(tmp_path, {"state/", "state/a"}.__contains__)) == ["run/", "state/b/"]
    folders = {"state/", "state/b/", "run/"}
    assert sorted(foreign_files(tmp_path, folders.__contains__)) == ["run/d", "state/a", "state/b/c"]


def test_overwrite_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    with new_file(tmp_path / "out", overwrite=True) as file:
        file.write_text("new")
    assert tree(tmp_path) == {"out": b"new"}


def test_overwriting_a_path_that_does_not_exist_creates_it(tmp_path: Path) -> None:
    fill(tmp_path / "out", own)
    with new_file(tmp_path / "file", overwrite=True) as file:
        file.write_text("new")
    assert tree(tmp_path) == {"file": b"new", "out": None, "out/new": b"new"}


def test_a_link_to_a_directory_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old").write_text("old")
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    fill(tmp_path / "out", own)
    assert (tmp_path / "out").is_symlink()
    assert tree(tmp_path / "disk") == {"new": b"new"}


def test_a_broken_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="is a broken link"):
        fill(tmp_path / "out")
    with pytest.raises(CheckpointError, match="is a broken link"), new_file(tmp_path / "out"):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), CheckpointError("damaged")])
@pytest.mark.parametrize("replaceable", [None, own])
def test_an_error_during_the_write_leaves_nothing(
    tmp_path: Path, error: BaseException, replaceable: Replaceable | None
) -> None:
    target = tmp_path / "a" / "b" / "out"
    with pytest.raises(type(error)), new_directory(target, replaceable=replaceable) as directory:
        (directory / "half").write_text("half")
        raise error
    assert tree(tmp_path) == {}


def test_a_full_disk_is_a_checkpoint_error_and_leaves_the_old_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    before = tree(tmp_path)
    message = r"cannot write .*out': No space left on device"
    with pytest.raises(CheckpointError, match=message), new_directory(tmp_path / "out", replaceable=own):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["x" * 300, "file/out"])
def test_a_path_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot write"):
        fill(tmp_path / name)
    assert tree(tmp_path) == {"file": b"mine"}


def test_replacing_files_keeps_others_and_creates_the_directory(tmp_path: Path) -> None:
    replace_files(tmp_path / "out", {"a": "first"})
    (tmp_path / "out" / "mine").write_text("mine")
    replace_files(tmp_path / "out", {"b": "second"}, remove=["a", "gone"])
    assert tree(tmp_path) == {"out": None, "out/b": b"second", "out/mine": b"mine"}


def test_an_error_of_the_source_changes_nothing(tmp_path: Path) -> None:
    source = huggingface_directory(tmp_path / "source")
    checkpoint = bridge.load(source)
    os.truncate(source / "model.safetensors", (source / "model.safetensors").stat().st_size - 1)
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        bridge.save(checkpoint, tmp_path / "out", format="flax")
    assert tree(tmp_path) == before

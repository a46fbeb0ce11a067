"""Writing is all or nothing: an error leaves what was there, and nothing else."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from models import huggingface_directory, random_checkpoint

import bridge
from bridge import CheckpointError
from bridge.files import new_directory


def tree(path: Path) -> dict[str, bytes | None]:
    """Everything under `path`, hidden files too."""
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


def fill(path: Path, **options: bool) -> None:
    with new_directory(path, **options) as directory:
        (directory / "new").write_text("new")


def test_a_new_directory_appears_complete_and_alone(tmp_path: Path) -> None:
    with new_directory(tmp_path / "a" / "b" / "out") as directory:
        (directory / "new").write_text("new")
        (directory / "sub").mkdir()
        assert not (tmp_path / "a" / "b" / "out").exists()
    assert tree(tmp_path / "a" / "b") == {"out": None, "out/new": b"new", "out/sub": None}


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
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


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match=r"out' exists"):
        fill(tmp_path / "out")
    assert tree(tmp_path) == {"out": b"mine"}


def test_overwrite_replaces_a_directory_and_keeps_none_of_it(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    fill(tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == {"out": None, "out/new": b"new"}


def test_overwrite_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    fill(tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == {"out": None, "out/new": b"new"}


def test_overwrite_of_what_is_not_there_is_an_ordinary_write(tmp_path: Path) -> None:
    fill(tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == {"out": None, "out/new": b"new"}


def test_a_link_to_a_directory_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old").write_text("old")
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    fill(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert tree(tmp_path / "disk") == {"new": b"new"}


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), CheckpointError("damaged")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path, error: BaseException, overwrite: bool) -> None:
    with pytest.raises(type(error)), new_directory(tmp_path / "a" / "b" / "out", overwrite=overwrite) as directory:
        (directory / "half").write_text("half")
        raise error
    assert tree(tmp_path) == {}


def test_a_full_disk_is_a_checkpoint_error_and_leaves_the_old_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    before = tree(tmp_path)
    says = r"cannot write .*out': No space left on device"
    with pytest.raises(CheckpointError, match=says), new_directory(tmp_path / "out", overwrite=True):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert tree(tmp_path) == before


def test_a_directory_that_somebody_filled_meanwhile_is_not_destroyed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write"), new_directory(tmp_path / "out") as directory:
        (directory / "new").write_text("new")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("theirs")
    assert tree(tmp_path) == {"out": None, "out/theirs": b"theirs"}


def test_the_old_directory_comes_back_if_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    before = tree(tmp_path)
    rename = Path.rename

    def fail_once(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(CheckpointError, match="cannot write"):
        fill(tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["x" * 300, "file/out"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot write"):
        fill(tmp_path / name)
    assert tree(tmp_path) == {"file": b"mine"}


# The same through bridge.save


def test_a_source_that_fails_while_it_is_read_leaves_everything_as_it_was(tmp_path: Path) -> None:
    source = huggingface_directory(tmp_path / "source")
    checkpoint = bridge.load(source)
    os.truncate(source / "model.safetensors", (source / "model.safetensors").stat().st_size - 1)
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        bridge.save(checkpoint, tmp_path / "out", format="flax")
    assert tree(tmp_path) == before


def test_saving_refuses_an_existing_target_and_overwrite_replaces_it(tmp_path: Path) -> None:
    path = huggingface_directory(tmp_path / "out")
    (path / "leftover.txt").write_text("old")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="exists; choose another name"):
        bridge.save(random_checkpoint(seed=1), path, format="flax")
    assert tree(tmp_path) == before
    bridge.save(random_checkpoint(seed=1), path, format="flax", overwrite=True)
    assert set(tree(path)) == {"config.json", "flax_model.safetensors"}
    assert (bridge.load(path).tensors["wpe.weight"] == random_checkpoint(seed=1).tensors["wpe.weight"]).all()

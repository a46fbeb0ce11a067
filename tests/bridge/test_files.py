"""Writing is all or nothing: an error leaves what was there, and nothing else."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from models import huggingface_directory, random_checkpoint

import bridge
from bridge import CheckpointError, files
from bridge.files import new_directory, new_file, replace_files


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


@pytest.fixture(params=[True, False], ids=["exchange", "no exchange"])
def exchange(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the system can exchange two names."""
    if not request.param:
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
        return False
    for name in ("one", "other"):
        (tmp_path / name).touch()
    if not files._exchanged(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this system, or this file system, does not exchange names")
    for name in ("one", "other"):
        (tmp_path / name).unlink()
    return True


def test_a_directory_and_a_file_take_each_others_place(tmp_path: Path, exchange: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with new_file(tmp_path / "out", overwrite=True) as file:
        file.write_text("new")
    assert tree(tmp_path) == {"out": b"new"}
    fill(tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == {"out": None, "out/new": b"new"}


def test_the_old_one_is_there_until_the_new_one_is(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at before every rename and every flush to the disk; without an exchange it is gone for a moment."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    seen = []
    for owner, name in ((Path, "rename"), (os, "fsync")):

        def looked(*arguments: object, inner: object = getattr(owner, name)) -> object:
            seen.append(tree(tmp_path / "out"))
            return inner(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(owner, name, looked)
    fill(tmp_path / "out", overwrite=True)
    old, new = {"old": b"old"}, {"new": b"new"}
    assert [state for n, state in enumerate(seen) if not n or state != seen[n - 1]] == (
        [old, new] if exchange else [old, {}, new]
    )


def test_the_old_directory_comes_back_if_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    before = tree(tmp_path)
    rename = Path.rename

    def fail_once(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(CheckpointError, match="cannot write"):
        fill(tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == before


# What a process leaves that is killed, and what one does that is not

WRITER = """
import sys
from pathlib import Path
from bridge.files import new_directory, new_file
new = new_file if sys.argv[2] == "file" else new_directory
with new(sys.argv[1]) as beside:
    (beside if sys.argv[2] == "file" else beside / "new").write_text("half")
    print("half", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def writer(target: Path, kind: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has written half of `target`, and waits for a line before it goes on."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", WRITER, str(target), kind]
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "half\n"
        yield process


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path, kind: str) -> None:
    for name in (
        "out[1]",
        "out[1].gguf",
        "out1",
    ):  # another's name that begins alike, and one that a pattern would match
        with writer(tmp_path / name, kind) as killed:
            killed.send_signal(signal.SIGKILL)
    others = {p for p in tmp_path.iterdir() if not p.name.startswith(".out[1].") or p.name.startswith(".out[1].gguf.")}
    with writer(tmp_path / "out[1]", kind) as living:
        [its_own] = {*tmp_path.iterdir()} - others
        fill(tmp_path / "out[1]")
        assert {*tmp_path.iterdir()} == {*others, its_own, tmp_path / "out[1]"}
        assert tree(tmp_path / "out[1]") == {"new": b"new"}
        (tmp_path / "out[1]" / "new").unlink()
        (tmp_path / "out[1]").rmdir()
        living.communicate("go on\n")
        assert living.returncode == 0
    assert {*tmp_path.iterdir()} == {*others, tmp_path / "out[1]"}
    assert tree(tmp_path)["out[1]" if kind == "file" else "out[1]/new"] == b"half"


def test_without_locks_nothing_is_taken_for_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", refuse)
    left = tmp_path / ".out.0123abcd.partial"
    left.mkdir()
    fill(tmp_path / "out")
    assert tree(tmp_path) == {".out.0123abcd.partial": None, "out": None, "out/new": b"new"}


def test_a_writer_whose_lock_is_not_seen_names_nothing_that_is_being_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where each of two machines has its own locks."""
    monkeypatch.setattr("fcntl.flock", lambda descriptor, operation: None)
    with pytest.raises(CheckpointError, match="cannot write"), new_directory(tmp_path / "out") as directory:
        (directory / "first").write_text("first")
        with monkeypatch.context() as removing:
            removing.setattr(files.shutil, "rmtree", lambda path, **options: next(path.rglob("first")).unlink())
            files._clear_away(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_only_looks_as_if_it_was_left_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "old").write_text("mine")
    (tmp_path / ".out.0123abcd.partial").symlink_to(tmp_path / "mine")
    os.mkfifo(tmp_path / ".out.0123abce.partial")
    (tmp_path / ".out.mine.partial").mkdir()
    before = {*tmp_path.rglob("*")}
    fill(tmp_path / "out")
    assert {*tmp_path.rglob("*")} == {*before, tmp_path / "out", tmp_path / "out" / "new"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_one_that_was_killed_between_two_renames_has_its_old_directory_back(tmp_path: Path, overwrite: bool) -> None:
    """Where names cannot be exchanged. The next one refuses to overwrite it, or does."""
    for name in ("old", "new"):
        (tmp_path / ".out.0123abcd.partial" / name).mkdir(parents=True)
        (tmp_path / ".out.0123abcd.partial" / name / name).write_text(name)
    if overwrite:
        fill(tmp_path / "out", overwrite=True)
    else:
        with pytest.raises(CheckpointError, match=r"out' exists"):
            fill(tmp_path / "out")
    name = "new" if overwrite else "old"
    assert tree(tmp_path) == {"out": None, f"out/{name}": name.encode()}


def test_a_place_that_another_clears_away_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, places = files.exclusive_lock, []

    @contextmanager
    def late(path: Path) -> Iterator[bool | None]:
        places.append(path)
        if len(places) == 1:  # it is gone when it is opened
            path.rmdir()
        with lock(path) as held:
            if len(places) == 2:  # and once it is open
                path.rmdir()
            yield held if len(places) != 3 else False  # and is locked by the one that does so

    monkeypatch.setattr(files, "exclusive_lock", late)
    fill(tmp_path / "out")
    assert len({*places}) == 4
    assert tree(tmp_path) == {places[2].name: None, "out": None, "out/new": b"new"}


@pytest.mark.parametrize("name", ["x" * 300, "file/out"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot write"):
        fill(tmp_path / name)
    assert tree(tmp_path) == {"file": b"mine"}


def test_several_files_are_never_old_and_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at where a kill could come: before each rename. An error at any of them leaves the old ones."""
    old, new = (dict.fromkeys(("vocab.json", "merges.txt"), text) for text in (b"old", b"new"))
    rename, seen = Path.rename, []

    def there() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def watched(path: Path, target: Path) -> Path:
        seen.append(there())
        if len(seen) == fails_at:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watched)
    for fails_at in range(6, 0, -1):
        (tmp_path / "vocab.json").write_text("old")
        (tmp_path / "merges.txt").write_text("old")
        (tmp_path / "tokenizer.json").write_text("old")
        seen.clear()
        try:
            replace_files(tmp_path, {"vocab.json": "new", "merges.txt": "new"}, remove=["tokenizer.json"])
            assert (fails_at, there()) == (6, new)
        except CheckpointError:
            assert there() == {**old, "tokenizer.json": b"old"}
        assert all(len({*files.values()}) <= 1 for files in seen)
        assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(seen) == 1


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

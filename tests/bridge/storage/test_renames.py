"""New data never replaces data of another program, and an error restores the old data."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from faults.disks import namespace
from support.file_trees import fill, make_hidden_directory, own, tree

from bridge import CheckpointError
from bridge.storage import renames
from bridge.storage.atomic_writes import Replaceable, new_directory, new_file, replace_files


@pytest.fixture(params=[True, False], ids=["exchange", "no exchange"])
def exchange(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the system can exchange two names."""
    if not request.param:
        monkeypatch.setattr(renames, "_rename_at_once", lambda one, other, flag: False)
        return False
    for name in ("one", "other"):
        (tmp_path / name).touch()
    if not renames._rename_at_once(tmp_path / "one", tmp_path / "other", renames._EXCHANGE):
        pytest.skip("this system, or this file system, does not exchange names")
    for name in ("one", "other"):
        (tmp_path / name).unlink()
    return True


@pytest.mark.parametrize("replaceable", [None, own])
def test_a_directory_created_during_the_write_is_not_replaced(
    tmp_path: Path, exchange: bool, replaceable: Replaceable | None
) -> None:
    with (
        pytest.raises(
            CheckpointError, match="not overwritten, because" if replaceable else "exists; choose another name"
        ),
        new_directory(tmp_path / "out", replaceable=replaceable) as directory,
    ):
        (directory / "new").write_text("new")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("theirs")
    assert tree(tmp_path) == {"out": None, "out/theirs": b"theirs"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_created_during_the_write_is_not_replaced(tmp_path: Path, exchange: bool, overwrite: bool) -> None:
    message = "was changed by another program" if overwrite else "exists; choose another name"
    with pytest.raises(CheckpointError, match=message), new_file(tmp_path / "out", overwrite=overwrite) as file:
        file.write_text("new")
        (tmp_path / "out").write_text("theirs")
    assert tree(tmp_path) == {"out": b"theirs"}


@pytest.mark.parametrize("links", [True, False])
def test_a_file_created_after_the_last_check_is_kept(
    tmp_path: Path, exchange: bool, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is created after the last check of the name, before the rename."""
    rename = renames.rename_without_replacing

    def late(new: Path, target: Path) -> None:
        target.write_text("theirs")
        rename(new, target)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(renames, "rename_without_replacing", late)
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(CheckpointError, match="was created by another program"), new_file(tmp_path / "out") as file:
        file.write_text("new")
    assert tree(tmp_path) == {"out": b"theirs"}


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_is_named_without_renameat2(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renames, "_rename_at_once", lambda one, other, flag: False)
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: os.open(tmp_path / "no" / "links", 0))
    with new_file(tmp_path / "out") as file:
        file.write_text("new")
    assert tree(tmp_path) == {"out": b"new"}


def test_a_file_that_changes_while_it_is_overwritten_is_kept(tmp_path: Path, exchange: bool) -> None:
    (tmp_path / "out").write_text("old")
    with (
        pytest.raises(CheckpointError, match="was changed by another program"),
        new_file(tmp_path / "out", overwrite=True) as file,
    ):
        file.write_text("new")
        (tmp_path / "out").write_text("theirs")
    assert tree(tmp_path) == {"out": b"theirs"}


def test_a_file_created_in_a_directory_during_its_overwrite_is_kept(tmp_path: Path, exchange: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with (
        pytest.raises(CheckpointError, match="- 'theirs'"),
        new_directory(tmp_path / "out", replaceable=own) as directory,
    ):
        (directory / "new").write_text("new")
        (tmp_path / "out" / "theirs").write_text("theirs")
    assert tree(tmp_path) == {"out": None, "out/old": b"old", "out/theirs": b"theirs"}


def test_the_old_directory_exists_until_the_new_one_does(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test inspects the directory before every rename and flush. Without an exchange, it is briefly missing."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    seen = []
    for owner, name in ((Path, "rename"), (os, "fsync")):

        def inspected(*arguments: object, inner: object = getattr(owner, name)) -> object:
            seen.append(tree(tmp_path / "out"))
            return inner(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(owner, name, inspected)
    fill(tmp_path / "out", own)
    old, new = {"old": b"old"}, {"new": b"new"}
    assert [state for n, state in enumerate(seen) if not n or state != seen[n - 1]] == (
        [old, new] if exchange else [old, {}, new]
    )


def test_the_old_directory_is_restored_if_the_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    before = tree(tmp_path)
    rename = Path.rename

    def fail_once(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(renames, "_rename_at_once", lambda one, other, flag: False)
    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(CheckpointError, match="cannot write"):
        fill(tmp_path / "out", own)
    assert tree(tmp_path) == before


def test_an_interrupt_between_two_renames_restores_the_old_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        renamed = rename(self, target)
        if self.name == "out":
            raise KeyboardInterrupt
        return renamed

    monkeypatch.setattr(renames, "_rename_at_once", lambda one, other, flag: False)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "out", own)
    assert tree(tmp_path) == {"out": None, "out/old": b"old"}


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_files_that_cannot_be_moved_back_are_kept_in_the_hidden_directory(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program creates a file with the name of an old file that was moved out."""
    rename = renames.rename_without_replacing

    def late(path: Path, target: Path) -> None:
        if path.name == "new":
            (tmp_path / "old").write_text("theirs") if kind == "file" else (tmp_path / "old").mkdir()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(path, target)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(renames, "rename_without_replacing", late)
    (tmp_path / "old").write_text("old")
    with (
        pytest.raises(CheckpointError, match=r"are kept in '.*kept'"),
        new_directory(".", replaceable=own) as directory,
    ):
        (directory / "new").write_text("new")
    after = tree(tmp_path)
    [kept] = [name for name in after if name.endswith("/kept/old")]
    assert after[kept] == b"old"
    assert after["old"] == (b"theirs" if kind == "file" else None)
    (tmp_path / "old").unlink() if kind == "file" else (tmp_path / "old").rmdir()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    fill(Path())
    assert tree(tmp_path)[kept] == b"old", "no later writer removes it"


def test_several_files_are_never_a_mixture_of_old_and_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inspects the state before each rename, where a kill may occur. An error at any rename leaves the old files."""
    old, new = (dict.fromkeys(("vocab.json", "merges.txt"), text) for text in (b"old", b"new"))
    seen: list[dict[str, bytes]] = []

    def there() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def watched(rename: Callable[[Path, Path], object]) -> Callable[[Path, Path], object]:
        def watching(path: Path, target: Path) -> object:
            seen.append(there())
            if len(seen) == fails_at:
                raise OSError(errno.EIO, "Input/output error")
            return rename(path, target)

        return watching

    monkeypatch.setattr(Path, "rename", watched(Path.rename))
    monkeypatch.setattr(renames, "rename_without_replacing", watched(renames.rename_without_replacing))
    for fails_at in range(7, 0, -1):  # three files are moved out, the state is recorded, two files are moved in
        (tmp_path / "vocab.json").write_text("old")
        (tmp_path / "merges.txt").write_text("old")
        (tmp_path / "tokenizer.json").write_text("old")
        seen.clear()
        try:
            replace_files(tmp_path, {"vocab.json": "new", "merges.txt": "new"}, remove=["tokenizer.json"])
            assert (fails_at, there()) == (7, new)
        except CheckpointError:
            assert there() == {**old, "tokenizer.json": b"old"}
        assert all(len({*contents.values()}) <= 1 for contents in seen[:6])
        assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert seen


def test_the_working_directory_is_filled_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    before = out.stat().st_ino
    fill(Path())
    assert (out.stat().st_ino, tree(tmp_path)) == (before, {"out": None, "out/new": b"new"})
    (out / "old").write_text("old")
    with pytest.raises(CheckpointError, match=r"'\.' exists"):
        fill(Path())
    fill(Path(), own)
    assert (out.stat().st_ino, tree(tmp_path)) == (before, {"out": None, "out/new": b"new"})
    (out / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="- 'mine'"):
        fill(Path(), own)
    assert Path.cwd() == out
    assert tree(tmp_path) == {"out": None, "out/mine": b"mine", "out/new": b"new"}


def test_a_file_that_appears_in_the_working_directory_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="exists"), new_directory(".") as directory:
        (directory / "new").write_text("new")
        (tmp_path / "theirs").write_text("theirs")
    assert tree(tmp_path) == {"theirs": b"theirs"}


@pytest.mark.parametrize("name", ["new", "z"])
def test_a_file_that_appears_between_two_moves_is_kept(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = renames.rename_without_replacing

    def late(path: Path, target: Path) -> None:
        (tmp_path / name).write_text("theirs")
        rename(path, target)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(renames, "rename_without_replacing", late)
    (tmp_path / "old").write_text("old")
    refused = pytest.raises(CheckpointError, match="was created by another") if name == "new" else nullcontext()
    with refused, new_directory(".", replaceable=own) as directory:
        (directory / "new").write_text("new")
    contents = {"new": b"new"} if name == "z" else {"old": b"old"}
    assert tree(tmp_path) == {**contents, name: b"theirs"}


@pytest.mark.parametrize("state", ["leaving", "replaced"])
def test_the_next_writer_completes_the_move_of_a_killed_one(
    tmp_path: Path, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = make_hidden_directory(tmp_path / f".{tmp_path.name}.0123abcd.partial")
    for name in (state, "new"):
        (place / name).mkdir()
    (place / state / "old").write_text("old")
    (place / "new" / "new").write_text("new")
    (place / "new" / "more").write_text("new")
    with pytest.raises(CheckpointError, match="exists"):
        fill(Path())
    assert tree(tmp_path) == ({"old": b"old"} if state == "leaving" else {"more": b"new", "new": b"new"})


MOUNTED = """
import subprocess, sys
from pathlib import Path
from bridge import CheckpointError
from bridge.storage.atomic_writes import new_directory, new_file

place = Path(sys.argv[1])
(place / "disk").mkdir()
for options in (["-t", "tmpfs", "none"], ["--bind", place / "disk"]):
    out = place / "with space"
    out.mkdir()
    subprocess.run(["mount", *options, out], check=True)
    device = out.stat().st_dev, out.stat().st_ino
    for replaceable in (None, {"new"}.__contains__):
        with new_directory(out, replaceable=replaceable) as directory:
            (directory / "new").write_text("new")
        assert (out.stat().st_dev, out.stat().st_ino) == device
        assert {p.name: p.read_text() for p in out.iterdir()} == {"new": "new"}
    (out / "mine").write_text("mine")
    for replaceable in (None, {"new"}.__contains__):
        try:
            with new_directory(out, replaceable=replaceable):
                raise AssertionError
        except CheckpointError as error:
            print(error)
        assert {p.name for p in out.iterdir()} == {"new", "mine"}
    subprocess.run(["umount", out], check=True)
    out.rmdir()

(place / "ck").mkdir()
(place / "ck" / "new").write_text("old")
(place / "host").write_text("host")
subprocess.run(["mount", "--bind", place / "host", place / "ck" / "new"], check=True)
try:
    with new_directory(place / "ck", replaceable={"new"}.__contains__):
        raise AssertionError
except CheckpointError as error:
    print(error)
assert (place / "host").read_text() == "host"
subprocess.run(["umount", place / "ck" / "new"], check=True)
assert {p.name for p in place.iterdir()} == {"disk", "ck", "host"}

(place / "data").write_text("data")
(place / "file").touch()
subprocess.run(["mount", "--bind", place / "data", place / "file"], check=True)
try:
    with new_file(place / "file", overwrite=True):
        raise AssertionError
except CheckpointError as error:
    print(error)
assert (place / "data").read_text() == "data"
subprocess.run(["umount", place / "file"], check=True)
"""


def test_a_mount_point_is_filled_and_stays_mounted(tmp_path: Path) -> None:
    """For example, the volume of a container, or a bind mount of the same file system."""
    try:
        command = namespace()
    except OSError as error:
        pytest.skip(str(error))
    done = subprocess.run([*command, sys.executable, "-c", MOUNTED, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("with space' exists; choose another name") == 2
    assert done.stdout.count("- 'mine'") == 2
    assert "ck/new' is a mount point inside the target" in done.stdout
    assert "file' is a mount point and cannot be replaced" in done.stdout

"""Writing is all or nothing: an error leaves what was there, and nothing else."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from faults.disks import namespace
from support.models import config_for, huggingface_directory

import bridge
from bridge import CheckpointError
from bridge.storage import atomic_writes as files
from bridge.storage.atomic_writes import Replaceable, foreign_files, new_directory, new_file, replace_files


def tree(path: Path) -> dict[str, bytes | None]:
    """Everything under `path`, hidden files too."""
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


def fill(path: Path, replaceable: Replaceable | None = None) -> None:
    with new_directory(path, replaceable=replaceable) as directory:
        (directory / "new").write_text("new")


def hidden_place(path: Path) -> Path:
    """A hidden directory as this project makes it."""
    path.mkdir(exist_ok=True)
    (path / files._MARKER).touch()
    return path


def own(name: str) -> bool:
    """The files that these tests' writers may replace."""
    return name in ("old", "new")


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


def test_a_directory_of_replaceable_files_is_replaced_and_none_of_them_stays(tmp_path: Path) -> None:
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


def test_permission_to_replace_missing_files_changes_nothing(tmp_path: Path) -> None:
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
def test_an_error_in_the_middle_leaves_nothing(
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
    says = r"cannot write .*out': No space left on device"
    with pytest.raises(CheckpointError, match=says), new_directory(tmp_path / "out", replaceable=own):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert tree(tmp_path) == before


@pytest.fixture(params=[True, False], ids=["exchange", "no exchange"])
def exchange(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the system can exchange two names."""
    if not request.param:
        monkeypatch.setattr(files, "_rename_at_once", lambda one, other, flag: False)
        return False
    for name in ("one", "other"):
        (tmp_path / name).touch()
    if not files._rename_at_once(tmp_path / "one", tmp_path / "other", files._EXCHANGE):
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
    says = "was changed by another program" if overwrite else "exists; choose another name"
    with pytest.raises(CheckpointError, match=says), new_file(tmp_path / "out", overwrite=overwrite) as file:
        file.write_text("new")
        (tmp_path / "out").write_text("theirs")
    assert tree(tmp_path) == {"out": b"theirs"}


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_at_the_last_moment_is_kept(
    tmp_path: Path, exchange: bool, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last look at the name, before the rename."""
    rename = files._rename_without_replacing

    def late(new: Path, target: Path) -> None:
        target.write_text("theirs")
        rename(new, target)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(files, "_rename_without_replacing", late)
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(CheckpointError, match="was created by another program"), new_file(tmp_path / "out") as file:
        file.write_text("new")
    assert tree(tmp_path) == {"out": b"theirs"}


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_is_named_without_renameat2(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_rename_at_once", lambda one, other, flag: False)
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


def test_a_file_that_appears_in_a_directory_while_that_is_overwritten_is_kept(tmp_path: Path, exchange: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with (
        pytest.raises(CheckpointError, match="- 'theirs'"),
        new_directory(tmp_path / "out", replaceable=own) as directory,
    ):
        (directory / "new").write_text("new")
        (tmp_path / "out" / "theirs").write_text("theirs")
    assert tree(tmp_path) == {"out": None, "out/old": b"old", "out/theirs": b"theirs"}


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
    fill(tmp_path / "out", own)
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

    monkeypatch.setattr(files, "_rename_at_once", lambda one, other, flag: False)
    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(CheckpointError, match="cannot write"):
        fill(tmp_path / "out", own)
    assert tree(tmp_path) == before


# What a process leaves that is killed, and what one does that is not

WRITER = """
import sys
from pathlib import Path
from bridge.storage.atomic_writes import new_directory, new_file
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
    left = hidden_place(tmp_path / ".out.0123abcd.partial")
    fill(tmp_path / "out")
    marker = {left.name: None, f"{left.name}/{files._MARKER}": b""}
    assert tree(tmp_path) == {**marker, "out": None, "out/new": b"new"}


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


@pytest.mark.parametrize("name", ["thesis", "new", "old", "leaving", "replaced"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_directory_that_only_has_the_name_of_a_hidden_one_is_kept(tmp_path: Path, name: str, inside: bool) -> None:
    out = tmp_path / "out"
    place = (out if inside else tmp_path) / ".out.0123abcd.partial"
    (place / name).mkdir(parents=True)
    (place / name / "mine").write_text("mine")
    before = tree(tmp_path)
    if inside:
        with pytest.raises(CheckpointError, match=r"- '\.out\.0123abcd\.partial/'"):
            fill(out, own)
        assert tree(tmp_path) == before
    else:
        fill(out)
        assert tree(tmp_path) == {**before, "out": None, "out/new": b"new"}


@pytest.mark.parametrize("name", ["new", "old", "leaving", "replaced"])
@pytest.mark.parametrize("inside", [False, True])
def test_no_link_in_a_planted_hidden_directory_is_followed(tmp_path: Path, name: str, inside: bool) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "key").write_text("mine")
    (tmp_path / "out").mkdir()
    place = hidden_place((tmp_path / "out" if inside else tmp_path) / ".out.0123abcd.partial")
    if name != "replaced":
        (place / "replaced").mkdir()
    (place / name).symlink_to(tmp_path / "docs")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="not overwritten") if inside else nullcontext():
        fill(tmp_path / "out", own)
    assert tree(tmp_path) == (before if inside else {**before, "out/new": b"new"})


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a file away")
def test_a_hidden_directory_of_another_user_is_kept(tmp_path: Path) -> None:
    place = hidden_place(tmp_path / ".out.0123abcd.partial")
    (place / "leaving").mkdir()
    (place / "leaving" / "old").write_text("theirs")
    os.chown(place, 65534, 65534)
    before = tree(tmp_path)
    fill(tmp_path / "out")
    assert tree(tmp_path) == {**before, "out": None, "out/new": b"new"}


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_cannot_be_moved_back_is_kept_in_the_hidden_directory(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something appears under the name of an old file after that has left the directory."""
    rename = files._rename_without_replacing

    def late(path: Path, target: Path) -> None:
        if path.name == "new":
            (tmp_path / "old").write_text("theirs") if kind == "file" else (tmp_path / "old").mkdir()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(path, target)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "_rename_without_replacing", late)
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


def test_an_interrupt_between_two_renames_brings_the_old_directory_back(
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

    monkeypatch.setattr(files, "_rename_at_once", lambda one, other, flag: False)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "out", own)
    assert tree(tmp_path) == {"out": None, "out/old": b"old"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_one_that_was_killed_between_two_renames_has_its_old_directory_back(tmp_path: Path, overwrite: bool) -> None:
    """Where names cannot be exchanged. The next one refuses to overwrite it, or does."""
    for name in ("old", "new"):
        (hidden_place(tmp_path / ".out.0123abcd.partial") / name).mkdir()
        (tmp_path / ".out.0123abcd.partial" / name / name).write_text(name)
    if overwrite:
        fill(tmp_path / "out", own)
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
            shutil.rmtree(path)
        with lock(path) as held:
            if len(places) == 2:  # and once it is open
                shutil.rmtree(path)
            yield held if len(places) != 3 else False  # and is locked by the one that does so

    monkeypatch.setattr(files, "exclusive_lock", late)
    fill(tmp_path / "out")
    assert len({*places}) == 4
    left = {places[2].name: None, f"{places[2].name}/{files._MARKER}": b""}
    assert tree(tmp_path) == {**left, "out": None, "out/new": b"new"}


@pytest.mark.parametrize("name", ["x" * 300, "file/out"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot write"):
        fill(tmp_path / name)
    assert tree(tmp_path) == {"file": b"mine"}


def test_several_files_are_never_old_and_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state before each rename, where a kill could come. An error at any of them leaves the old files."""
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
    monkeypatch.setattr(files, "_rename_without_replacing", watched(files._rename_without_replacing))
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


def test_replacing_files_keeps_the_others_and_makes_the_directory(tmp_path: Path) -> None:
    replace_files(tmp_path / "out", {"a": "first"})
    (tmp_path / "out" / "mine").write_text("mine")
    replace_files(tmp_path / "out", {"b": "second"}, remove=["a", "gone"])
    assert tree(tmp_path) == {"out": None, "out/b": b"second", "out/mine": b"mine"}


# Directories that cannot be renamed: the working directory and mount points


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
    rename = files._rename_without_replacing

    def late(path: Path, target: Path) -> None:
        (tmp_path / name).write_text("theirs")
        rename(path, target)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "_rename_without_replacing", late)
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
    place = hidden_place(tmp_path / f".{tmp_path.name}.0123abcd.partial")
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
    """A container's volume, also a bind mount of the same file system."""
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


# Systems without fcntl

WITHOUT_FCNTL = """
import sys
sys.modules["fcntl"] = None
import bridge
source, target = sys.argv[1:]
bridge.save(bridge.load(source), target, format="flax")
bridge.save(bridge.load(source), target, format="flax", overwrite=True)
bridge.save_tokenizer(bridge.byte_tokenizer(), target)
bridge.save(bridge.load(source), target + ".gguf", format="gguf")
print(bridge.fingerprint(bridge.load(target).tensors))
"""


def test_conversions_work_where_there_is_no_fcntl(tmp_path: Path) -> None:
    source = huggingface_directory(tmp_path / "source", config_for("gguf"))
    arguments = [sys.executable, "-c", WITHOUT_FCNTL, str(source), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (bridge.fingerprint(bridge.load(source).tensors) + "\n", "")
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out", "out.gguf"}


# The same through bridge.save


def test_a_source_that_fails_while_it_is_read_leaves_everything_as_it_was(tmp_path: Path) -> None:
    source = huggingface_directory(tmp_path / "source")
    checkpoint = bridge.load(source)
    os.truncate(source / "model.safetensors", (source / "model.safetensors").stat().st_size - 1)
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        bridge.save(checkpoint, tmp_path / "out", format="flax")
    assert tree(tmp_path) == before

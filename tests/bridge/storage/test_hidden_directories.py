"""The next writer removes what a killed writer left behind, and nothing else."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from support.file_trees import fill, make_hidden_directory, own, tree

from bridge import CheckpointError
from bridge.storage import atomic_writes, hidden_directories
from bridge.storage.atomic_writes import new_directory
from bridge.storage.hidden_directories import MARKER

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
    """Start a process that writes half of `target`, then waits for a line on stdin."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", WRITER, str(target), kind]
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "half\n"
        yield process


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_files_of_a_killed_writer_are_removed_and_those_of_a_live_one_stay(tmp_path: Path, kind: str) -> None:
    for name in (
        "out[1]",
        "out[1].gguf",
        "out1",
    ):  # names with the same beginning, and one that matches as a glob pattern
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
        living.communicate("continue\n")
        assert living.returncode == 0
    assert {*tmp_path.iterdir()} == {*others, tmp_path / "out[1]"}
    assert tree(tmp_path)["out[1]" if kind == "file" else "out[1]/new"] == b"half"


def test_a_writer_whose_lock_is_invisible_fails_if_its_files_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks are not shared between two machines."""
    monkeypatch.setattr("fcntl.flock", lambda descriptor, operation: None)
    with pytest.raises(CheckpointError, match="cannot write"), new_directory(tmp_path / "out") as directory:
        (directory / "first").write_text("first")
        with monkeypatch.context() as removing:
            removing.setattr(atomic_writes.shutil, "rmtree", lambda path, **options: next(path.rglob("first")).unlink())
            atomic_writes._remove_leftovers(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_files_with_similar_names_stay(tmp_path: Path) -> None:
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
def test_a_foreign_directory_with_the_name_of_a_hidden_one_is_kept(tmp_path: Path, name: str, inside: bool) -> None:
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
    place = make_hidden_directory((tmp_path / "out" if inside else tmp_path) / ".out.0123abcd.partial")
    if name != "replaced":
        (place / "replaced").mkdir()
    (place / name).symlink_to(tmp_path / "docs")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="not overwritten") if inside else nullcontext():
        fill(tmp_path / "out", own)
    assert tree(tmp_path) == (before if inside else {**before, "out/new": b"new"})


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a file away")
def test_a_hidden_directory_of_another_user_is_kept(tmp_path: Path) -> None:
    place = make_hidden_directory(tmp_path / ".out.0123abcd.partial")
    (place / "leaving").mkdir()
    (place / "leaving" / "old").write_text("theirs")
    os.chown(place, 65534, 65534)
    before = tree(tmp_path)
    fill(tmp_path / "out")
    assert tree(tmp_path) == {**before, "out": None, "out/new": b"new"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_next_writer_restores_a_directory_after_a_kill_between_two_renames(tmp_path: Path, overwrite: bool) -> None:
    """For systems that cannot exchange two names."""
    for name in ("old", "new"):
        (make_hidden_directory(tmp_path / ".out.0123abcd.partial") / name).mkdir()
        (tmp_path / ".out.0123abcd.partial" / name / name).write_text(name)
    if overwrite:
        fill(tmp_path / "out", own)
    else:
        with pytest.raises(CheckpointError, match=r"out' exists"):
            fill(tmp_path / "out")
    name = "new" if overwrite else "old"
    assert tree(tmp_path) == {"out": None, f"out/{name}": name.encode()}


def test_a_hidden_directory_removed_before_it_is_locked_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, places = hidden_directories.exclusive_lock, []

    @contextmanager
    def late(path: Path) -> Iterator[bool | None]:
        places.append(path)
        if len(places) == 1:  # removed before it is opened
            shutil.rmtree(path)
        with lock(path) as locked:
            if len(places) == 2:  # removed after it is opened
                shutil.rmtree(path)
            yield locked if len(places) != 3 else False  # locked by another process

    monkeypatch.setattr(hidden_directories, "exclusive_lock", late)
    fill(tmp_path / "out")
    assert len({*places}) == 4
    left = {places[2].name: None, f"{places[2].name}/{MARKER}": b""}
    assert tree(tmp_path) == {**left, "out": None, "out/new": b"new"}

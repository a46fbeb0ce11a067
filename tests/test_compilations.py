"""The cache of compiled programs that the tests use: one process at a time, and emptied after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import compilations
from support.compilations import kept_compilations


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directories that JAX is told to use, instead of telling it."""
    directories: list[str] = []
    monkeypatch.setattr(compilations, "_keep_in", directories.append)
    return directories


def test_programs_are_kept_for_the_next_process(tmp_path: Path, used: list[str]) -> None:
    directory = tmp_path / "programs"
    for _ in range(2):
        with kept_compilations(directory):
            directory.joinpath("program").touch()
    assert used == [str(directory)] * 2
    assert directory.joinpath("program").exists()


def test_a_directory_in_use_is_left_alone(tmp_path: Path, used: list[str]) -> None:
    with kept_compilations(tmp_path / "programs"), kept_compilations(tmp_path / "programs"):
        assert used[0] == str(tmp_path / "programs")
        assert used[1] != used[0] and Path(used[1]).is_dir()
    assert not Path(used[1]).exists()


def test_what_a_killed_process_wrote_is_removed(tmp_path: Path, used: list[str]) -> None:
    directory = tmp_path / "programs"
    directory.mkdir()
    directory.joinpath("truncated").touch()
    directory.with_suffix(".lock").write_text("in use")
    with kept_compilations(directory):
        assert [*directory.iterdir()] == []

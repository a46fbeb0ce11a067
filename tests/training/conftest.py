"""A finished run, shared by all tests that inspect or resume one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from support.training_runs import RECIPE, run_in

from gpt2_jax.training import Outcome


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, compiling_quickly: Callable[[], AbstractContextManager[None]]
) -> Outcome:
    """A finished run. Tests must not write to it; they use `copy`."""
    with compiling_quickly():
        return run_in(tmp_path_factory.mktemp("finished"), RECIPE)


@pytest.fixture
def copy(finished: Outcome, tmp_path: Path) -> Path:
    """A copy of the finished run and its data in another directory, because a run may be moved."""
    shutil.copytree(finished.run.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path

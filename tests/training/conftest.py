"""One run, finished, for all tests of training that look at one or go on from it."""

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
    """Not to be written to; `copy` is."""
    with compiling_quickly():
        return run_in(tmp_path_factory.mktemp("finished"), RECIPE)


@pytest.fixture
def copy(finished: Outcome, tmp_path: Path) -> Path:
    """The finished run with its data, in a directory of its own: a run may move."""
    shutil.copytree(finished.run.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path

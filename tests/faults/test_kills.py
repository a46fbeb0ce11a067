"""The short version of `faults.kills`."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from faults import kills, runs

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("quick_compilation")]  # also in child processes


def test_a_killed_run_gives_the_same_result(tmp_path: Path) -> None:
    runs.write_text(tmp_path)
    expected, seen = runs.finish(tmp_path, "whole"), Counter[str]()
    assert kills.kill_until_done(tmp_path, "killed", 2, random.Random(3), seen) == expected
    assert seen["kills"], "it was killed at least once"

"""The short version of `faults.full_disks`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from faults.disks import INSIDE, namespace
from faults.runs import ROOT

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("quick_compilation")]  # also in child processes


def test_a_run_that_cannot_write_names_the_file_and_can_be_resumed(tmp_path: Path) -> None:
    try:
        start = namespace()
    except OSError as error:
        pytest.skip(str(error))
    few = ["--levels", "3", "--limits", "1", "--cached", "0", "--read-only", "0", "--no-conversions"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, INSIDE: "1", "TMPDIR": str(tmp_path), "PYTHONPATH": path}
    command = [*start, sys.executable, "-m", "faults.full_disks", *few]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "full disks: 3" in done.stdout and "limited files: 1" in done.stdout

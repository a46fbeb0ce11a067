"""FSDP2 shards the reference model in two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.processes
def test_sharded_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    script = Path(__file__).with_name("fsdp.py")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, script, str(rank), tmp_path], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    for rank in range(2):
        assert float((tmp_path / f"difference-{rank}").read_text()) <= 1e-12  # float64 gradients of order 1

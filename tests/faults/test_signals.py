"""The short version of `faults.signals`: a second signal while the checkpoint of the first is written."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from faults import runs
from faults.signals import SAMPLES, Fault, examine

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("quick_compilation")]  # also in child processes


def test_a_run_ended_by_a_second_signal_resumes_to_the_same_result(tmp_path: Path) -> None:
    runs.write_text(tmp_path)
    _, wrong = examine(
        tmp_path, Fault(("training", "writing"), signal.SIGINT), runs.finish(tmp_path, "whole", *SAMPLES)
    )
    assert not wrong

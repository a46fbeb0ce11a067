"""The short version of `faults.two_processes`."""

from __future__ import annotations

from collections import Counter

import pytest

from faults.two_processes import Fault, Trial, examine

pytestmark = pytest.mark.mesh

SOME = [
    Fault("SIGTERM", 0, ("evaluating",), "fsdp=2"),
    Fault("SIGTERM", 1, ("writing",), "fsdp=2"),
    Fault("SIGTERM to both", 1, ("training", "exporting"), "fsdp=2"),
    Fault("third SIGTERM", 1, ("training", "the last save"), "fsdp=2"),
    Fault("kill -9", 0, ("committing",), "fsdp=2"),
    Fault("kill -9", 1, ("pruning",), "fsdp=2"),
]


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    return Trial(tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("fault", SOME, ids=str)
def test_the_other_process_ends_and_the_run_can_be_resumed(fault: Fault, trial: Trial) -> None:
    assert examine(trial, fault, Counter()) == []

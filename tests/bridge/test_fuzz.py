"""Damaged checkpoints and companions of every kind. `tests/fuzz/driver.py` tests many more."""

from __future__ import annotations

import itertools
import json
import signal
import sys
from pathlib import Path

import pytest
from fuzz import settings
from fuzz.driver import COMPANIONS, FORMATS, fuzz, main

MUTANTS = 1_000
MUTANTS_OF_COMPANIONS = 300


@pytest.mark.sampled(6)
@pytest.mark.parametrize("format", [*FORMATS, *COMPANIONS])
def test_a_damaged_checkpoint_is_refused_or_read_correctly(tmp_path: Path, format: str) -> None:
    mutants = MUTANTS if format in FORMATS else MUTANTS_OF_COMPANIONS
    outcome = fuzz(format, mutants, tmp_path)
    print(format, dict(outcome.counts), f"slowest {1000 * outcome.slowest:.0f} ms")
    assert outcome.counts.total() == mutants
    assert outcome.counts["refused"] > mutants // 20


def test_the_driver_continues_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted and resumed run has the same counts as an uninterrupted one."""
    state, calls, judge = tmp_path / "state.json", itertools.count(), settings.judge

    def interrupted(source: Path) -> str:
        if next(calls) == 40:
            raise KeyboardInterrupt
        return judge(source)

    monkeypatch.setattr(settings, "judge", interrupted)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    arguments = ["driver", "--formats", "settings", "--mutants", "100", "--state", str(state)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="run the same command again to continue"):
        main()
    assert sum(json.loads(state.read_text())["outcomes"]["settings"]["counts"].values()) == 39, "one is the sample"
    main()
    counts = json.loads(state.read_text())["outcomes"]["settings"]["counts"]
    assert counts == fuzz("settings", 100, tmp_path, seed=1).counts
    monkeypatch.setattr(sys, "argv", [*arguments, "--seed", "2"])
    with pytest.raises(SystemExit, match="is of seed 1"):
        main()

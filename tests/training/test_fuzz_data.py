"""A few hundred damaged files of each kind of data and run; `tests/fuzz/driver.py` tests many more."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.driver import DATA, fuzz

MUTANTS = 300


@pytest.mark.sampled(3)
@pytest.mark.parametrize("format", DATA)
def test_a_damaged_file_is_refused_or_read_correctly(tmp_path: Path, format: str) -> None:
    outcome = fuzz(format, MUTANTS, tmp_path)
    print(format, dict(outcome.counts), f"slowest {1000 * outcome.slowest:.0f} ms")
    assert outcome.counts.total() == MUTANTS
    assert outcome.counts["refused"] > MUTANTS // 20

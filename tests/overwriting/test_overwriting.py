"""Two hundred random trees and writers. `tests/overwriting/driver.py` tests many more."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

import bridge.io
import bridge.storage.atomic_writes
from overwriting import driver

CASES = 200


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, quick_compilation: None) -> dict[str, Path]:
    return driver.templates(tmp_path_factory.mktemp("templates"))


def test_no_writer_changes_a_foreign_file(made: dict[str, Path], tmp_path: Path) -> None:
    counts = Counter(driver.cases(CASES, 0, made, tmp_path))
    print(dict(counts))
    assert counts.total() == CASES
    assert min(counts[outcome] for outcome in ("refused", "written", "overwritten")) > CASES // 50


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (bridge.io, "_replaceable", lambda target, format, checkpoint: lambda name: True),
        (bridge.storage.atomic_writes, "foreign_files", lambda directory, replaceable: []),
        ("gpt2_jax.console.report_files", "is_report", lambda path: True),
    ],
    ids=["every name is replaceable", "nothing is foreign", "every file is a report"],
)
def test_a_writer_that_breaks_the_rule_is_found(
    owner: object, name: str, broken: object, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{owner}.{name}" if isinstance(owner, str) else f"{owner.__name__}.{name}", broken)
    with pytest.raises(AssertionError, match=re.compile("case .*(changed|working directory|source)", re.DOTALL)):
        for _ in driver.cases(3000, 0, made, tmp_path):
            pass


def test_the_rule_names_the_files_that_each_format_writes(made: dict[str, Path]) -> None:
    for to in driver.WRITABLE:
        names = re.compile("|".join([driver.WEIGHTS[to], *driver.COMPANIONS]))
        assert all(names.fullmatch(path.name) for path in made[to].iterdir())

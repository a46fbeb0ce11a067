"""The short version of `faults.corruptions`."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import pytest
from support.training_runs import recipe, run_in

from faults.corruptions import KINDS, Undamaged, assert_skipped, corruptions

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_the_newest_undamaged_checkpoint_is_read_and_the_others_are_named(tmp_path: Path) -> None:
    undamaged = Undamaged.of(run_in(tmp_path, recipe(eval_every=1, checkpoint_every=1, keep_last=4)).run)
    seen = set()
    for kind, run, damaged in islice(corruptions(undamaged, random.Random(0), tmp_path / "copy"), 40):
        assert_skipped(undamaged, run, damaged)
        seen.add(kind)
    assert len(seen) == len(KINDS)

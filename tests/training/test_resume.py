"""A run interrupted at ten random steps and by crashes gives bitwise the same result as an uninterrupted one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from faults.runs import DETERMINISTIC, arrays
from support.training_runs import records

from bridge.formats.trainers.run import steps

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("interrupted.py")
PATHS = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("quick_compilation")]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, quick_compilation: None) -> Path:
    directory = tmp_path_factory.mktemp("interrupted")
    environment = {**os.environ, "PYTHONPATH": PATHS, **DETERMINISTIC}
    command = [sys.executable, "-W", "error", PROGRAM, directory]
    program = subprocess.run(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, timeout=500, check=False
    )
    assert program.returncode == 0, program.stderr
    return directory


@pytest.fixture(params=["adamw", "muon"])
def both(request: pytest.FixtureRequest, interrupted: Path) -> Path:
    """`adamw` also has dropout, microbatches and an exponential moving average of the weights."""
    return interrupted / request.param


def stored(run: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint: weights, their moving average, optimizer state, step."""
    return dict(arrays(run, step))


def test_weights_and_optimizer_state_are_bitwise_equal(both: Path) -> None:
    last = steps(both / "whole")[-1]
    assert steps(both / "parts") == steps(both / "whole")
    whole, parts = stored(both / "whole", last), stored(both / "parts", last)
    kinds = {name.split(".")[0] for name in whole}
    assert kinds >= {"step", "params", "opt_state"}
    assert ("ema_params" in kinds) == (both.name == "adamw")
    assert whole.keys() == parts.keys()
    assert [name for name in whole if whole[name].tobytes() != parts[name].tobytes()] == []


def test_every_step_used_the_same_batch(both: Path) -> None:
    consumed = json.loads((both / "consumed.json").read_text())
    assert len(set(consumed["whole"].values())) == len(consumed["whole"]) == steps(both / "whole")[-1]
    assert consumed["parts"] == consumed["whole"]


def test_the_log_is_the_same_but_for_speeds(both: Path) -> None:
    """Records after the checkpoint that a crashed run resumes from are not duplicated."""
    assert records(both / "parts") == records(both / "whole")
    logged = [record["step"] for record in records(both / "whole")]
    assert logged == sorted(set(logged))


def test_the_exports_are_the_same_bytes(both: Path) -> None:
    exports = [(both / name / "export" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert exports[0] == exports[1]

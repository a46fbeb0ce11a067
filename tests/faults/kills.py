"""kill -9 at random times: every resumed run must give the result of a run that was never killed.

    PYTHONPATH=.:tests python -m faults.kills --kills 200 --runs 50 --seed 0

Kills each run three to five times, until both numbers are reached; half of the kills fall into a save.
Exits with 1 if the result of a run differs.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from bridge.formats.trainers.run import steps
from faults import runs


def kill_until_done(directory: Path, name: str, kills: int, rng: random.Random, seen: Counter[str]) -> str:
    """Kill a run this many times, then let it finish. Returns its result."""
    for _ in range(kills):
        began = time.time()
        process = runs.start(directory, name)
        wait = _moment(directory / name, process, rng)
        time.sleep(wait)
        if process.poll() is not None:
            break  # it finished before the kill
        process.send_signal(signal.SIGKILL)
        process.communicate()
        seen["kills"] += 1
        seen["inside a save"] += _saves(directory / name, began)
    return runs.finish(directory, name)


def _saves(run: Path, began: float) -> bool:
    """Return whether a checkpoint is being written, other than partial ones of the last kill or under removal."""
    newest = (steps(run) or [0])[-1]
    partial = {path: int(path.name.split(".")[1]) for path in (run / "checkpoints").glob(".*.partial*")}
    return any(step > newest and path.stat().st_mtime > began for path, step in partial.items())


def _moment(run: Path, process: subprocess.Popen[str], rng: random.Random) -> float:
    """Return the seconds to wait: one kill in eight is at the start of the process, others within 0.4 s of a save."""
    if rng.random() < 1 / 8:
        return rng.uniform(0, 3)
    known = _files(run)
    while process.poll() is None and not any(name.startswith(".") for name in _files(run) - known):
        time.sleep(0.002)
    return rng.uniform(0, 0.4)


def _files(run: Path) -> set[str]:
    folder = run / "checkpoints"
    return {p.name for p in folder.iterdir()} if folder.is_dir() else set()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, seen, ends = random.Random(options.seed), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        runs.write_text(directory)
        expected = runs.finish(directory, "whole")
        while (
            seen["kills"] < options.kills
            or seen["inside a save"] < options.kills / 2
            or seen["runs of three or more"] < options.runs
        ):
            kills, before = rng.randint(3, 5), seen["kills"]
            same = kill_until_done(directory, f"run {seen['runs']}", kills, rng, seen) == expected
            seen["runs"] += 1
            seen["runs of three or more"] += seen["kills"] - before >= 3
            ends["same" if same else "different"] += 1
            print(dict(seen), dict(ends), flush=True)
    return int(ends["different"] > 0)


if __name__ == "__main__":
    sys.exit(main())

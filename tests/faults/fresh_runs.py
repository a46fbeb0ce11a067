"""Repeat one command: with `--deterministic`, all runs must agree bitwise; without, print how far they differ.

    PYTHONPATH=.:tests python -m faults.fresh_runs --runs 10

Exits with 1 if two runs with `--deterministic` differ.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from itertools import combinations
from pathlib import Path

import numpy as np

from bridge.formats.trainers.run import steps
from faults import runs
from gpt2_jax.training.run.metrics import read_metrics

LARGER = ("--batch-size", 16, "--n-positions", 64, "--seq-len", 64, "--attn-pdrop", 0.1)
"""Larger than in the other fault tests, because XLA on CPU processes small arrays with one thread."""


def train(directory: Path, name: str, *flags: object) -> Path:
    """Train in a separate process on all processors, with the environment of this one."""
    places = ["--data", directory / "text.txt", "--cache", directory / "cache", "--out", directory / name]
    command = [sys.executable, "-c", "from gpt2_jax.cli import main; main()", "train"]
    command += map(str, (*places, *runs.FLAGS, *LARGER, *flags))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(runs.ROOT)}
    done = subprocess.run(command, env=environment, cwd=runs.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return directory / name


def weights(run: Path) -> np.ndarray:
    return np.concatenate([a.ravel() for name, a in runs.arrays(run, steps(run)[-1]) if name.startswith("params.")])


def spread(found: list[Path]) -> str:
    """Return a sentence with the number of different results and the largest difference."""
    ends = {runs.outcome(run) for run in found}
    apart = max(np.abs(weights(a) - weights(b)).max() for a, b in combinations(found, 2))
    losses = [read_metrics(run)[-1]["val_loss"] for run in found]
    return (
        f"{len(found)} runs, {len(ends)} different results; weights differ by at most {apart:.2g}, the largest is "
        f"{np.abs(weights(found[0])).max():.2g}; last validation losses differ by {max(losses) - min(losses):.2g} nats"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    count = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        runs.write_text(directory)
        one = [train(directory, f"one {n}", "--deterministic") for n in range(count)]
        print("--deterministic:", spread(one), flush=True)
        many = [train(directory, f"many {n}") for n in range(count)]
        print(f"{os.cpu_count()} processors:", spread(many), flush=True)
        print("one of each:", spread([one[0], many[0]]), flush=True)
        return int(len({runs.outcome(run) for run in one}) > 1)


if __name__ == "__main__":
    sys.exit(main())

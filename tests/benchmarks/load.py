"""Time of loading a 124M checkpoint onto the device, compared with reading the same bytes.

    python -m tests.benchmarks.load [directory]

The peer is `np.fromfile` of the same file into new memory. Any way to get the weights into memory takes at least this
long, except for a memory map. Runs alternate in one process, and the benchmark prints medians.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import bridge
import gpt2_jax
from gpt2_jax.bench.disk_tasks import write_checkpoint

PAIRS = 7


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        directory = (
            Path(sys.argv[1])
            if len(sys.argv) > 1
            else write_checkpoint(Path(scratch) / "gpt2", bridge.GPT2_SIZES["gpt2"])
        )
        weights = directory / "model.safetensors"
        measured = [
            (_seconds(lambda: np.fromfile(weights, np.uint8)), _seconds(_load(directory))) for _ in range(PAIRS)
        ]
    peer, ours = (statistics.median(column) for column in zip(*measured, strict=True))
    ratio = statistics.median(b / a for a, b in measured)
    spread = sorted(b / a for a, b in measured)
    print(f"np.fromfile                  {peer:.3f} s")
    print(f"gpt2_jax.from_pretrained     {ours:.3f} s")
    print(f"ratio, median of {PAIRS} pairs     {ratio:.2f}  (from {spread[0]:.2f} to {spread[-1]:.2f})")


def _load(directory: Path) -> Callable[[], object]:
    return lambda: jax.block_until_ready(gpt2_jax.from_pretrained(directory)[1])


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    kept = action()
    elapsed = time.perf_counter() - start
    del kept
    return elapsed


if __name__ == "__main__":
    main()

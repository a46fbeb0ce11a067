"""`gpt2 train` for the faults' runs: without the second start, and without measuring the machine's speed."""

from __future__ import annotations

import sys

from gpt2_jax.cli import main
from gpt2_jax.train import throughput

if __name__ == "__main__":
    throughput._measured_peak = lambda dtype: 1e9
    main(sys.argv[1:])

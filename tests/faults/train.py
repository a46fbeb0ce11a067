"""`gpt2 train` for the fault tests, without the restart for huge pages and without measuring the peak FLOP/s."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from faults import phases
from gpt2_jax import hardware
from gpt2_jax.cli import main

if __name__ == "__main__":
    hardware.measured_peak_flops = lambda dtype: 1e9
    phases.stay_in(json.loads(os.environ.get(phases.PLACES, "{}")))
    if phases.SAVED in os.environ:
        phases.note_saves(Path(os.environ[phases.SAVED]))
    main(sys.argv[1:])

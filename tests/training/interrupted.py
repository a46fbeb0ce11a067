"""Training with and without interruptions, in one thread; test_resume.py runs it in a separate process.

    python interrupted.py DIRECTORY

Writes DIRECTORY/NAME/whole, DIRECTORY/NAME/parts and DIRECTORY/NAME/consumed.json: the hash of the batch of each
step, for both. It uses one thread, because the order of XLA's sums depends on the number of threads.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from support.training_runs import recipe, run_in

from gpt2_jax import hardware
from gpt2_jax.training import TrainConfig, loop

CONFIGS = {
    "adamw": recipe(max_steps=24, resid_pdrop=0.1, num_microbatches=2, ema_decay=0.9, eval_every=7, keep_last=1),
    "muon": recipe(max_steps=9, optimizer="muon", eval_every=7),
}
RANDOM_STEPS = sorted(random.Random(3).sample(range(1, 24), 10))
INTERRUPTIONS = {
    "adamw": [*((step, "stop") for step in RANDOM_STEPS), (24, "crash")],
    "muon": [(2, "stop"), (5, "crash"), (8, "crash")],
}
"""The step and the kind of each interruption. After an error in a step, steps from the last checkpoint are repeated."""


class Crash(Exception):
    """An error in the middle of a step."""


def train(directory: Path, name: str, config: TrainConfig, at: int = 0, how: str = "") -> dict[int, str]:
    """Start or resume, and interrupt at step `at`. Returns the hashes of the batches."""
    consumed = {}

    def batches(*args: Any, start_step: int, **options: Any) -> Iterator[Any]:
        for step, batch in enumerate(training_batches(*args, start_step=start_step, **options), start=start_step + 1):
            if step == at and how == "crash":
                raise Crash
            if step == at:
                signal.raise_signal(signal.SIGTERM)
            consumed[step] = hashlib.sha256(b"".join(batch[key].tobytes() for key in sorted(batch))).hexdigest()
            yield batch

    loop.training_batches = batches
    with suppress(Crash):
        run_in(directory, config, name, resume=True)
    return consumed


def compile_once() -> None:
    """Share one compiled step among all runs of a model, because compilation takes longer than the runs."""
    make, made = loop.make_train_step, {}
    loop.make_train_step = lambda model, tx, **options: made.setdefault(model, make(model, tx, **options))
    loop.make_eval_step = cache(loop.make_eval_step)


if __name__ == "__main__":
    training_batches = loop.training_batches
    hardware.measured_peak_flops = lambda dtype: 1e9
    compile_once()
    for label, config in CONFIGS.items():
        directory = Path(sys.argv[1]) / label
        whole = train(directory, "whole", config)
        parts: dict[int, str] = {}
        for at, how in (*INTERRUPTIONS[label], (0, "")):
            again = train(directory, "parts", config, at, how)
            assert all(parts.get(step, seen) == seen for step, seen in again.items()), "a step with another batch"
            parts |= again
        (directory / "consumed.json").write_text(json.dumps({"whole": whole, "parts": parts}))

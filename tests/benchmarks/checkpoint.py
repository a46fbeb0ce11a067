"""Slowdown of training while a checkpoint is written, with Orbax alone and with fsync, hashing and verification.

    python -m tests.benchmarks.checkpoint [rounds] [--preset gpt2] [--batch-size 1] [--seq-len 512] [--max-steps 6]

Each round times the same number of training steps after no save, after `orbax.save_async` alone, and after
`Checkpoints.save`. The order alternates, and each measurement starts with an idle disk. The benchmark prints the
time relative to the steps without a save in the same round (median and range), the seconds until the checkpoint is
complete, and the times of the disk and of SHA-256 alone. It needs three times the state's size on disk.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from bridge.formats.trainers.run import CHECKPOINTS
from bridge.storage import manifest
from gpt2_jax.parallel.sharding import make_mesh
from gpt2_jax.training import PRESETS, make_optimizer, make_train_step
from gpt2_jax.training.run.checkpointing import Checkpoints
from gpt2_jax.training.state import initial_state, make_model

Waiting = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", type=int, nargs="?", default=5)
    parser.add_argument("--preset", choices=PRESETS, default="gpt2")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-steps", type=int, default=6)
    options = parser.parse_args()
    config = replace(
        PRESETS[options.preset],
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        num_microbatches=1,
        dtype="float32",
    )
    model, tx, mesh = make_model(config), make_optimizer(config.optimizer, 1000), make_mesh()
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, (options.batch_size, options.seq_len), np.int32)
    batch = {"input_ids": ids, "labels": ids}
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory(dir=".") as scratch:
        folder = Path(scratch).absolute()
        train_step = make_train_step(model, tx)
        state, _ = train_step(initial_state(config, model, tx, None, mesh), batch)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        shape = f"{options.batch_size} x {options.seq_len}"
        print(f"{options.preset}, {shape}: a state of {size:,} bytes; {_limits(folder, size)}")
        checkpoints = Checkpoints(folder, keep_last=1)

        def verified(state: Any) -> Waiting:
            checkpoints.save(state)
            return checkpoints.wait

        def orbax_alone(state: Any) -> Waiting:
            return ocp.save_async(folder / "orbax", state, overwrite=True).result

        kinds = {"none": lambda state: lambda: None, "orbax": orbax_alone, "verified": verified}

        def steps() -> Any:
            nonlocal state
            for _ in range(options.max_steps):
                state, metrics = train_step(state, batch)
                float(metrics["loss"])
            return state

        _compare(kinds, state, steps, options.rounds, options.max_steps)
        _time_manifest(folder / CHECKPOINTS / str(checkpoints.newest))


def _compare(
    kinds: dict[str, Callable[[Any], Waiting]], state: Any, steps: Callable[[], Any], rounds: int, num_steps: int
) -> None:
    """Time the steps after each kind of save, and print the times relative to those after no save."""
    stepping: dict[str, list[float]] = {name: [] for name in kinds}
    complete: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, save in kinds.items():
            os.sync()
            began = time.perf_counter()
            wait = save(state)
            state = steps()
            stepping[name].append(time.perf_counter() - began)
            wait()
            complete[name].append(time.perf_counter() - began)
        kinds = dict(reversed(kinds.items()))
    for name, times in stepping.items():
        ratios = sorted(mine / alone for mine, alone in zip(times, stepping["none"], strict=True))
        print(
            f"{name}: {num_steps} steps in {statistics.median(times):.2f} s, ratio {statistics.median(ratios):.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f}); complete after {statistics.median(complete[name]):.2f} s"
        )


def _limits(folder: Path, size: int) -> str:
    """Times of writing and hashing `size` bytes with one thread."""
    content, file = np.random.default_rng(1).bytes(2**28), folder / "limit"
    began = time.perf_counter()
    with file.open("wb") as out:
        for _ in range(-(-size // len(content))):
            out.write(content)
        os.fsync(out.fileno())
    written = time.perf_counter() - began
    file.unlink()
    began = time.perf_counter()
    hashlib.sha256(content)
    hashed = (time.perf_counter() - began) / len(content)
    return f"written to disk in {written:.2f} s, hashed once in {hashed * size:.2f} s"


def _time_manifest(directory: Path) -> None:
    began = time.perf_counter()
    manifest.commit(directory, {})
    written = time.perf_counter()
    manifest.verify(directory, from_disk=True)
    print(f"manifest alone: written in {written - began:.2f} s, verified in {time.perf_counter() - written:.2f} s")


if __name__ == "__main__":
    main()

"""A small run of `gpt2 train --deterministic` in a separate process, and its result."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorstore

from bridge.formats.trainers.run import steps, verified
from gpt2_jax.training.run.metrics import read_metrics

ROOT = Path(__file__).parents[2]
DETERMINISTIC = {"XLA_FLAGS": "--xla_gpu_deterministic_ops=true", "NPROC": "1"}
"""The environment variables that the flag sets."""
STEPS = 60
FLAGS = shlex.split(f"""
    --tokenizer bytes --n-positions 16 --n-embd 96 --n-layer 3 --n-head 3 --vocab-multiple 128 --resid-pdrop 0.1
    --max-steps {STEPS} --batch-size 4 --seq-len 12 --num-microbatches 2 --ema-decay 0.9
    --learning-rate 1e-2 --warmup-steps 2 --eval-every 20
    --eval-batches 1 --log-every 1 --checkpoint-every 3 --keep-last 2 --sample-tokens 0
""")


def write_text(directory: Path) -> None:
    lines = (f"line {i} says that {i} times {i} is {i * i};\n" for i in range(300))
    (directory / "text.txt").write_text("".join(lines))


def start(directory: Path, name: str, *more: object, variables: Mapping[str, str] = {}) -> subprocess.Popen[str]:
    """Start or resume the run, with additional environment variables."""
    environment = {
        **os.environ,
        **variables,
        "JAX_PLATFORMS": "cpu",
        **DETERMINISTIC,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(directory / "compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    places = ["--data", directory / "text.txt", "--cache", directory / "cache", "--out", directory / name]
    flags = map(str, [*places, *FLAGS, "--deterministic", *more])
    command = [sys.executable, "-m", "faults.train", "train", *flags, "--resume"]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)


def finish(directory: Path, name: str, *more: object) -> str:
    """Resume the run until it is complete. Returns the hash of the result."""
    process = start(directory, name, *more)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return outcome(directory / name)


def outcome(run: Path, last: int = STEPS) -> str:
    """Return the SHA-256 of the result of a run.

    It covers every array of the last checkpoint (parameters, moving average, optimizer state), the export, and the log
    with the loss of every step.
    """
    assert steps(run)[-1] == last
    verified(run, last)
    seen = hashlib.sha256()
    for name, array in arrays(run, last):
        seen.update(f"{name} {array.dtype} {array.shape}".encode())
        seen.update(array.tobytes())
    for file in ("export/model.safetensors", "export/config.json"):
        seen.update((run / file).read_bytes())
    for record in read_metrics(run):
        seen.update(repr(sorted((k, v) for k, v in record.items() if k not in ("tokens_per_second", "mfu"))).encode())
    return seen.hexdigest()


def arrays(run: Path, step: int) -> Iterator[tuple[str, Any]]:
    database: Any = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{run}/checkpoints/{step}/state/"}}
    keys = tensorstore.KvStore.open(database).result().list().result()
    for name in sorted({key.decode().split("/")[0] for key in keys}):
        spec: Any = {"driver": "zarr3", "fill_missing_data_reads": False, "kvstore": {**database, "path": f"{name}/"}}
        yield name, tensorstore.open(spec).result().read().result()

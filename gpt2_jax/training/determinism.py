"""The same bits in every run: what JAX has to be told before it looks for its devices.

Two things make a run differ in its last bits from another that was told the same. On GPU, kernels that add with
atomics, and matrix products chosen by how fast they were in a trial: `--xla_gpu_deterministic_ops` rules out both, and
cuDNN's attention keeps to it. On CPU, threads: there are as many as processors, and in which order they add depends on
which is faster (jax issue 39741); XLA's CPU client takes their number from NPROC.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from bridge.errors import quoted
from gpt2_jax.training.config import TrainingError

_NAME, _THREADS = "--xla_gpu_deterministic_ops", "NPROC"
_FLAG = f"{_NAME}=true"


def make_deterministic() -> None:
    """For this process, before JAX has looked for its devices; later it changes nothing.

    Raises `TrainingError` where XLA's flags are in a file, to which none can be added.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("--"):
        raise TrainingError(f"--deterministic: XLA_FLAGS is the file {quoted(flags)}; give the flags themselves")
    if not is_deterministic(os.environ):
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}".strip()
        os.environ[_THREADS] = "1"


def is_deterministic(environment: Mapping[str, str]) -> bool:
    given = [word for word in environment.get("XLA_FLAGS", "").split() if word.partition("=")[0] == _NAME]
    return given[-1:] == [_FLAG] and environment.get(_THREADS) == "1"  # XLA takes the last of a name


def require_deterministic() -> None:
    """Raise `TrainingError` where JAX was not told."""
    if not is_deterministic(os.environ):
        raise TrainingError(
            f"deterministic: JAX must have been told before it started, with XLA_FLAGS={_FLAG} and {_THREADS}=1, as "
            "`gpt2 train --deterministic` does; set both in the environment, and start again"
        )

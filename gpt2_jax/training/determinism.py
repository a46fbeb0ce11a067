"""Bitwise reproducible runs: settings that JAX reads before it initializes its backends.

Two runs with equal arguments may differ in their last bits for two reasons. On GPU, some kernels add with atomics, and
kernels for matrix products are selected by timing; `--xla_gpu_deterministic_ops` prevents both, also in cuDNN's
attention. On CPU, the order in which threads add depends on timing (jax issue 39741). XLA's CPU client takes the number
of threads from NPROC.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from bridge.errors import quoted
from gpt2_jax.training.errors import TrainingError

_NAME, _THREADS = "--xla_gpu_deterministic_ops", "NPROC"
_FLAG = f"{_NAME}=true"


def make_deterministic() -> None:
    """Make computations of this process deterministic. It has no effect after JAX has initialized its backends.

    Raises `TrainingError` if XLA_FLAGS names a file, to which no flag can be added.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("--"):
        raise TrainingError(f"--deterministic: XLA_FLAGS is the file {quoted(flags)}; give the flags themselves")
    if not is_deterministic(os.environ):
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}".strip()
        os.environ[_THREADS] = "1"


def is_deterministic(environment: Mapping[str, str]) -> bool:
    """Whether the environment variables make computations deterministic."""
    given = [word for word in environment.get("XLA_FLAGS", "").split() if word.partition("=")[0] == _NAME]
    return given[-1:] == [_FLAG] and environment.get(_THREADS) == "1"  # XLA uses the last value of a flag


def require_deterministic() -> None:
    """Raise `TrainingError` if the environment variables were not set before JAX started."""
    if not is_deterministic(os.environ):
        raise TrainingError(
            f"deterministic: XLA_FLAGS={_FLAG} and {_THREADS}=1 must be set before JAX starts, as "
            "`gpt2 train --deterministic` does; set both in the environment, and start again"
        )

"""Start a worker process, send it commands, and explain its failure."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import gpt2_jax
from gpt2_jax.console.process import with_huge_pages

WORKER = Path(__file__).with_name("worker.py")
ROOT = Path(gpt2_jax.__file__).parents[1]


class WorkerError(Exception):
    """A worker process ended unexpectedly. The message is the reason."""


class Worker:
    """A process that runs one implementation. It is killed at the end of the `with` block."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.began: float = time.perf_counter()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        # -P keeps the script's directory off the path, because its file names would hide other modules.
        command = [sys.executable, "-P", str(WORKER), name]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, env=worker_environment(os.environ), encoding="utf-8", **pipes)

    def request(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and return its reply. Raises `WorkerError` if the process ends without a reply."""
        assert self._process.stdin is not None and self._process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError, ConnectionError):
            print(json.dumps({"command": command, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._failure_reason())
        return json.loads(line)

    def _failure_reason(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        if code < 0:
            hint = ", probably because memory ran out" if code == -signal.SIGKILL else ""
            return f"killed by {signal.Signals(-code).name}{hint}"
        return lines[-1].strip() if lines else f"ended with exit code {code}"

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # closing flushes, which fails if the process has ended
                    pipe.close()
        self._errors.close()


def worker_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of every worker: huge pages as in `gpt2 train`, and no compilation caches.

    On GPUs, JAX allocates memory on demand, because it shares the GPU with the other worker.
    """
    settings = {
        **inherited,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [inherited.get("PYTHONPATH")])]),
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "HF_HUB_OFFLINE": "1",
    }
    return with_huge_pages(settings)

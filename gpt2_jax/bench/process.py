"""The parent's side of a worker: start it, ask it, and say why it died."""

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


class WorkerDied(Exception):
    """A worker ended before its work did; the message is its last word."""


class Worker:
    """A process that runs one implementation. Ends with the `with` block."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.began = time.perf_counter()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process is
        # -P: without the script's directory on the path, whose names are not for everybody.
        command = [sys.executable, "-P", str(WORKER), name]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, env=environment(os.environ), encoding="utf-8", **pipes)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The reply to one command. Raises `WorkerDied` where there is none."""
        assert self._process.stdin is not None and self._process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError, ConnectionError):
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        if not line:
            raise WorkerDied(self._last_word())
        return json.loads(line)

    def _last_word(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        if code < 0:
            hint = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
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
                with contextlib.suppress(OSError):  # what was not yet sent to one that is dead
                    pipe.close()
        self._errors.close()


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """What a worker runs with, all alike: large pages as `gpt2 train` takes them, and no compilation of an earlier day.

    On a GPU JAX takes memory as it needs it, because another process computes there too.
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

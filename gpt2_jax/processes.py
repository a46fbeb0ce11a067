"""Several processes as one program, on one machine or many: joining, agreeing, and ending together.

Built on `jax.distributed`: the first process runs JAX's coordination service, by which they find each other, notice
when one is lost, and hear of a preemption. Where there is one process, nothing here waits.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bridge import BridgeError
from bridge.errors import quoted

HEARTBEAT_TIMEOUT = 30
"""Seconds without a sign of life after which a process counts as lost, and the others end."""

_ENDED, _LOOK_EVERY = "gpt2_bridge/ended", 0.5
_joined: _Watch | None = None


class ProcessesError(BridgeError):
    """The processes do not find each other; the message says what was missing."""


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Become one of several processes, before JAX has looked for its devices.

    Args:
        coordinator: HOST:PORT of the first process; this, `processes` and `process` are found out on TPU pods, under
            SLURM and Open MPI.
        processes: how many take part.
        process: which this one is, from 0.

    Raises `ProcessesError` where they do not find each other within five minutes.
    """
    global _joined
    try:
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise ProcessesError(
            f"--distributed: {quoted(error, 400)}; on TPU pods and under SLURM and Open MPI the processes find each "
            "other, elsewhere give each --coordinator HOST:PORT, --processes N and --process I"
        ) from error
    _joined = _Watch()


def leave() -> None:
    """When this process's work is done: wait for the others, and be one process again."""
    global _joined
    if _joined is not None:
        _joined.stop()
        _joined = None
        jax.distributed.shutdown()


def end(code: int, why: str) -> None:
    """End this process now; and the others, with its reason, where it ends before the work is done."""
    if _joined is not None:
        _joined.tell(f"process {jax.process_index()}: {why}")
        _now(code)
    sys.exit(code)


def hear_of_others() -> None:
    """Before an error is explained: where another process has ended, that is why, and this one ends with its reason."""
    if _joined is not None:
        _joined.over.wait(3 * _LOOK_EVERY)


def are_joined() -> bool:
    return _joined is not None


def is_first() -> bool:
    """Whether this is the process that prints, and writes what only one may."""
    return not are_joined() or jax.process_index() == 0


def first_says(value: int) -> int:
    """The first process's value, in all of them; none goes on before all have asked."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if are_joined() else value


@contextmanager
def first_alone(what: str) -> Iterator[None]:
    """A block that the first process goes through before the others."""
    if not is_first():
        _wait(what)
    yield
    if is_first():
        _wait(what)


def wait_for_all(what: str) -> None:
    """Until every process is here."""
    _wait(what)


def _wait(what: str) -> None:
    if are_joined():
        multihost_utils.sync_global_devices(what)


class _Watch:
    """Looks whether another process has ended with an error, and then ends this one, which may be waiting for it."""

    def __init__(self) -> None:
        from jax._src.distributed import global_state  # JAX has no public name for its store of keys, as orbax knows

        self._client: Any = global_state.client
        self.over = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def stop(self) -> None:
        self.over.set()

    def tell(self, why: str) -> None:
        self.over.set()
        with suppress(Exception):  # another was faster, or the first process is gone
            self._client.key_value_set(_ENDED, why)
        if jax.process_index() == 0:  # the store ends with this process
            threading.Event().wait(4 * _LOOK_EVERY)

    def _look(self) -> None:
        while not self.over.wait(_LOOK_EVERY):
            try:
                why = self._client.key_value_try_get(_ENDED)
            except Exception:  # there is none yet; if the service is gone, JAX itself ends this process
                continue
            if not self.over.is_set():
                print(f"gpt2: ended with {why}", file=sys.stderr)
                _now(1)


def _now(code: int) -> None:
    """Without what Python and JAX do at the end, which would wait for the others."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)

"""Run several processes as one program, on one or many machines: join them, agree on values, and end together.

Built on `jax.distributed`. Process 0 runs JAX's coordination service, through which the processes find each other,
detect lost processes, and learn of a preemption. With a single process, all functions return at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from bridge import BridgeError
from bridge.errors import bullet_list, quoted
from gpt2_jax.console.process import exit_now
from gpt2_jax.console.terminal import print_error

HEARTBEAT_TIMEOUT = 30
"""Seconds without a heartbeat after which JAX considers a process lost and ends the others."""

_FAILURE_KEY, _HEARTBEATS_KEY = "gpt2_bridge/ended", "gpt2_bridge/heartbeats"
_POLL_INTERVAL = 0.5
"""Seconds between two heartbeats of a process, and between its checks for a failure of another."""
_SILENCE_LIMIT = 10
"""Seconds without a heartbeat after which a process is considered lost, and thus the cause of an error in another one.
Compilation may delay a heartbeat by some seconds."""
_FIRST = "process 0"
_HOW_TO_CONTINUE = "saved checkpoints are valid; continue with --resume in all processes"
_monitor: _PeerMonitor | None = None
"""Set while this process is one of several that `join` connected."""

T = TypeVar("T")


class ProcessesError(BridgeError):
    """The processes cannot form one program: they do not find each other, or were started with different arguments."""


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Join the processes of a program. Call it before JAX initializes its backends.

    If the processes do not find each other within five minutes, JAX ends this one.

    Args:
        coordinator: HOST:PORT of process 0. On TPU pods, under SLURM and under Open MPI, all three are detected.
        processes: the number of processes.
        process: the index of this process, from 0.

    Raises:
        ProcessesError: the processes cannot be detected, or JAX refuses the arguments.
    """
    global _monitor
    address = f" (process 0 at {coordinator})" if coordinator else ""
    exit_message = _ExitMessage(f"ended before all processes had connected{address}; was each of them started?")
    try:
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise ProcessesError(
            f"--distributed: {quoted(error, 400)}; on TPU pods and under SLURM and Open MPI, the processes find each "
            "other; on other systems, give each process --coordinator HOST:PORT, --processes N and --process I"
        ) from error
    finally:
        exit_message.cancel()
    _monitor = _PeerMonitor()


def leave() -> None:
    """Wait until all processes have finished, then disconnect this one."""
    global _monitor
    if _monitor is not None:
        wait_for_all("the end")
        _monitor.stop()
        _monitor = None
        jax.distributed.shutdown()


def end(code: int, why: str) -> None:
    """End this process. If the processes have not finished, end the others too, with `why` as their message."""
    if _monitor is not None:
        _monitor.report_failure(why)
        end_now(code)
    sys.exit(code)


def end_now(code: int) -> None:
    """End this process without the exit handlers of Python and JAX, which would wait for the other processes."""
    if _monitor is not None:
        _monitor.exit_message.cancel()
    exit_now(code)


def exit_if_peer_failed(error: Exception) -> None:
    """End this process if another one was lost, because `error` is then a consequence of the loss."""
    if _monitor is not None and (missing := _monitor.missing_peers()):
        why = f"{' and '.join(missing)} was lost: no heartbeat, and {type(error).__name__}: {quoted(error, 400)}"
        print_error(f"{why}; {_HOW_TO_CONTINUE}")
        end(1, why)


def are_several() -> bool:
    """Whether this is one of several processes, joined by `join` or by the caller with `jax.distributed.initialize`."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is process 0, which prints and writes shared files."""
    return not are_several() or jax.process_index() == 0


def broadcast_from_first(value: T) -> T:
    """Return process 0's `value` on every process. Blocks until all processes have called it.

    Use it for every decision that depends on the file system: processes may see different states of a shared directory.

    Args:
        value: anything that JSON can represent.
    """
    if not are_several():
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    received = multihost_utils.broadcast_one_to_all(np.resize(text, length))
    first: T = json.loads(bytes(np.asarray(received, np.uint8)))
    return first


def require_agreement(arguments: Mapping[str, Any]) -> None:
    """Raise `ProcessesError` on every process whose arguments differ from those of process 0.

    Processes with different arguments would compute nonsense, or wait for each other forever.
    """
    mine, first = json.loads(json.dumps(arguments)), broadcast_from_first(arguments)
    differing = [name for name in {**first, **mine} if first.get(name) != mine.get(name)]
    if differing:
        lines = [
            f"{name} is {quoted(mine.get(name))} here, but {quoted(first.get(name))} in process 0" for name in differing
        ]
        raise ProcessesError("this process and process 0 were started with different arguments:\n" + bullet_list(lines))


@contextmanager
def first_alone(what: str) -> Iterator[None]:
    """A block that process 0 completes before the other processes enter it. `what` names the barrier in errors."""
    if not is_first():
        wait_for_all(what)
    yield
    if is_first():
        wait_for_all(what)


def wait_for_all(what: str) -> None:
    """Block until all processes have called this. `what` names the barrier in errors, and must be equal on all."""
    if are_several():
        multihost_utils.sync_global_devices(what)


class _PeerMonitor:
    """A thread that sends heartbeats, and ends this process when another one reports a failure.

    Without it, this process could wait forever in a collective operation for one that has failed.
    """

    def __init__(self) -> None:
        from jax._src.distributed import global_state  # JAX's key-value store has no public name; Orbax uses this too

        self._client: Any = global_state.client
        self._name = f"process {global_state.process_id}"  # jax.process_index() would initialize backends, and may fail
        self.exit_message = _ExitMessage(
            f"{self._name} was killed, or JAX ended it for the reason above; {_HOW_TO_CONTINUE}"
        )
        self._stopped = threading.Event()
        threading.Thread(target=self._monitor, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()
        self.exit_message.cancel()

    def report_failure(self, why: str) -> None:
        """Make the other processes end with the message `why`."""
        self._stopped.set()
        with suppress(Exception):  # another process has reported first, or process 0 is gone
            self._client.key_value_set(_FAILURE_KEY, f"{self._name}: {why}")
        if self._name == _FIRST:  # the store ends with this process, so give the others time to read it
            time.sleep(4 * _POLL_INTERVAL)

    def missing_peers(self) -> list[str]:
        """Return the processes that send no heartbeat for `_SILENCE_LIMIT` seconds."""
        try:
            before = silent = self._heartbeats()
            for _ in range(round(_SILENCE_LIMIT / _POLL_INTERVAL)):
                self._stopped.wait(_POLL_INTERVAL)
                now = self._heartbeats()
                silent = {name: count for name, count in silent.items() if now.get(name) == before[name]}
                if not silent:
                    break
        except Exception:  # the store, which process 0 runs, is gone
            return [_FIRST]
        return [*silent]

    def _heartbeats(self) -> dict[str, str]:
        return {key.rpartition("/")[2]: count for key, count in self._client.key_value_dir_get(_HEARTBEATS_KEY)}

    def _monitor(self) -> None:
        count, key = 0, f"{_HEARTBEATS_KEY}/{self._name}"
        while not self._stopped.wait(_POLL_INTERVAL):
            count += 1
            try:
                self._client.key_value_set(key, str(count), allow_overwrite=True)
                why = self._client.key_value_try_get(_FAILURE_KEY)
            except Exception:  # no failure is reported; if the service is gone, JAX itself ends this process
                continue
            if not self._stopped.is_set():
                print_error(f"ended because of a failure in {why}")
                end_now(1)


class _ExitMessage:
    """A line on standard error if this process ends without printing a message itself.

    JAX ends a process that has lost the others with abort(), in a thread that Python cannot intercept. The kernel may
    also kill it when memory is short. A shell process therefore waits for this process to end, and prints the message
    unless `cancel` was called. (jaxlib 0.10.2 accepts a callback instead of abort(), but fails to pass it the reason:
    std::bad_cast.)
    """

    def __init__(self, message: str) -> None:
        script = 'trap "" HUP INT TERM; read -r cancelled || echo "gpt2: $0" >&2'
        self._lock = threading.Lock()
        self._shell: subprocess.Popen[bytes] | None = None
        with suppress(OSError):  # without a shell, there is no message
            self._shell = subprocess.Popen(
                ["sh", "-c", script, message], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
            )

    def cancel(self) -> None:
        with self._lock:
            shell, self._shell = self._shell, None
            if shell is not None:
                with suppress(OSError):
                    shell.communicate(b"\n")

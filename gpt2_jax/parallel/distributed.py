"""Several processes as one program, on one machine or many: joining, agreeing, and ending together.

Built on `jax.distributed`: the first process runs JAX's coordination service, by which they find each other, notice
when one is lost, and hear of a preemption. Where there is one process, nothing here waits.
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
"""Seconds without a sign of life after which a process counts as lost, and the others end."""

_ENDED, _SIGNS = "gpt2_bridge/ended", "gpt2_bridge/signs"
_LOOK_EVERY = 0.5
_SILENCE = 10
"""Seconds without a sign of life after which an error is taken for the other process's: compiling may take some."""
_FIRST = "process 0"
_GO_ON = "what was saved is sound; go on with --resume in all processes"
_joined: _Watch | None = None

T = TypeVar("T")


class ProcessesError(BridgeError):
    """The processes do not find each other; the message says what was missing."""


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Become one of several processes, before JAX has looked for its devices.

    Args:
        coordinator: HOST:PORT of the first process; this, `processes` and `process` are found out on TPU pods, under
            SLURM and Open MPI.
        processes: how many take part.
        process: which this one is, from 0.

    Raises `ProcessesError` where it is not known who they are. Where they do not find each other within five minutes,
    JAX ends this one.
    """
    global _joined
    where = f" (the first at {coordinator})" if coordinator else ""
    exit_message = _ExitMessage(f"ended before the processes had found each other{where}; was each started?")
    try:
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise ProcessesError(
            f"--distributed: {quoted(error, 400)}; on TPU pods and under SLURM and Open MPI the processes find each "
            "other, elsewhere give each --coordinator HOST:PORT, --processes N and --process I"
        ) from error
    finally:
        exit_message.are_said()
    _joined = _Watch()


def leave() -> None:
    """When this process's work is done, and the others': be one again."""
    global _joined
    if _joined is not None:
        wait_for_all("the end")
        _joined.stop()
        _joined = None
        jax.distributed.shutdown()


def end(code: int, why: str) -> None:
    """End this process now; and the others, with its reason, where it ends before the work is done."""
    if _joined is not None:
        _joined.tell(why)
        end_now(code)
    sys.exit(code)


def end_now(code: int) -> None:
    """Without what Python and JAX do at the end, which would wait for the others."""
    if _joined is not None:
        _joined.exit_message.are_said()
    exit_now(code)


def exit_if_peer_failed(error: Exception) -> None:
    """Before an error is explained: where another process has ended or is lost, that is why, and this one ends so."""
    if _joined is not None and (lost := _joined.missing_peers()):
        why = f"{' and '.join(lost)} was lost: no sign of life, and {type(error).__name__}: {quoted(error, 400)}"
        print_error(f"{why}; {_GO_ON}")
        end(1, why)


def are_several() -> bool:
    """Whether others take part, by `join` or by the caller's own `jax.distributed.initialize`."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that prints, and writes what only one may."""
    return not are_several() or jax.process_index() == 0


def broadcast_from_first(value: T) -> T:
    """The first process's value, of what JSON has, in all of them; none goes on before all have asked.

    What depends on files goes through here: each process may see a shared directory as it was at another moment.
    """
    if not are_several():
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    said = multihost_utils.broadcast_one_to_all(np.resize(text, length))
    first: T = json.loads(bytes(np.asarray(said, np.uint8)))
    return first


def require_agreement(told: Mapping[str, Any]) -> None:
    """Raise `ProcessesError`, in every process that it is true of, where this one was told something else than the
    first: together they would compute nonsense, or wait for each other for ever."""
    mine, first = json.loads(json.dumps(told)), broadcast_from_first(told)
    differing = [name for name in {**first, **mine} if first.get(name) != mine.get(name)]
    if differing:
        lines = [f"{name} is {quoted(mine.get(name))} here, and {quoted(first.get(name))} there" for name in differing]
        raise ProcessesError("this process was told something else than the first one:\n" + bullet_list(lines))


@contextmanager
def first_alone(what: str) -> Iterator[None]:
    """A block that the first process goes through before the others."""
    if not is_first():
        wait_for_all(what)
    yield
    if is_first():
        wait_for_all(what)


def wait_for_all(what: str) -> None:
    """Until every process is here."""
    if are_several():
        multihost_utils.sync_global_devices(what)


class _Watch:
    """Looks whether another process has ended with an error, and then ends this one, which may be waiting for it."""

    def __init__(self) -> None:
        from jax._src.distributed import global_state  # JAX has no public name for its store of keys, as orbax knows

        self._client: Any = global_state.client
        self._name = f"process {global_state.process_id}"  # jax.process_index() looks for devices, and may fail in that
        self.exit_message = _ExitMessage(f"{self._name} was killed, or JAX ended it for what it says above; {_GO_ON}")
        self.over = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def stop(self) -> None:
        self.over.set()
        self.exit_message.are_said()

    def tell(self, why: str) -> None:
        self.over.set()
        with suppress(Exception):  # another was faster, or the first process is gone
            self._client.key_value_set(_ENDED, f"{self._name}: {why}")
        if self._name == _FIRST:  # the store ends with this process
            time.sleep(4 * _LOOK_EVERY)

    def missing_peers(self) -> list[str]:
        """The processes that give no sign of life for ten seconds, in which the others may be heard of."""
        try:
            before = silent = self._signs()
            for _ in range(round(_SILENCE / _LOOK_EVERY)):
                self.over.wait(_LOOK_EVERY)
                signs = self._signs()
                silent = {name: sign for name, sign in silent.items() if signs.get(name) == before[name]}
                if not silent:
                    break
        except Exception:  # the store is gone
            return [_FIRST]
        return [*silent]

    def _signs(self) -> dict[str, str]:
        return {key.rpartition("/")[2]: sign for key, sign in self._client.key_value_dir_get(_SIGNS)}

    def _look(self) -> None:
        sign, mine = 0, f"{_SIGNS}/{self._name}"
        while not self.over.wait(_LOOK_EVERY):
            sign += 1
            try:
                self._client.key_value_set(mine, str(sign), allow_overwrite=True)
                why = self._client.key_value_try_get(_ENDED)
            except Exception:  # there is none yet; if the service is gone, JAX itself ends this process
                continue
            if not self.over.is_set():
                print_error(f"ended with {why}")
                end_now(1)


class _ExitMessage:
    """A line on standard error where this process ends without a word of its own.

    JAX ends a process that has lost the others by abort(), in a thread of which Python does not hear; then there are
    the kernel, when memory is short, and kill -9. So a shell waits beside it for its end. (jaxlib 0.10.2 takes a
    callback instead of abort(), and fails to give it the reason: std::bad_cast.)
    """

    def __init__(self, words: str) -> None:
        script = 'trap "" HUP INT TERM; read -r said || echo "gpt2: $0" >&2'
        self._lock = threading.Lock()
        self._shell: subprocess.Popen[bytes] | None = None
        with suppress(OSError):  # no shell, no words
            self._shell = subprocess.Popen(
                ["sh", "-c", script, words], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
            )

    def are_said(self) -> None:
        with self._lock:
            shell, self._shell = self._shell, None
            if shell is not None:
                with suppress(OSError):
                    shell.communicate(b"\n")

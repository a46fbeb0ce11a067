"""End a run on SIGINT or SIGTERM where it can save: between two steps, in an evaluation, or while a step is compiled.

With several processes, JAX handles SIGTERM from the time they are joined, and also receives the cloud's preemption
notices. Its sync manager makes all processes stop at the same call of `PreemptionHandler.check`.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from gpt2_jax.parallel.distributed import are_several

_HANDLED = (signal.SIGINT, signal.SIGTERM)
_POLL_INTERVAL = 0.2
"""Seconds between checks for a signal while a function is compiled."""


class Preempted(Exception):
    """A signal was received: save, and end the run."""


class PreemptionHandler:
    """A context manager that records the first SIGINT or SIGTERM, for `check` to report.

    With several processes, a signal may reach the processes one after the other. After all processes have agreed to
    stop, each therefore ignores the first SIGTERM that it receives, unless it received Ctrl-C before.

    Args:
        second: the handler for a second signal; by default the handler that was installed before. Python runs handlers
            only between bytecode instructions, so a second signal may have to wait. A command that owns its process
            should pass signal.SIG_DFL: the second signal then ends the process immediately.
    """

    def __init__(self, second: signal.Handlers | None = None) -> None:
        self.received: signal.Signals | None = None
        self._second, self._checks = second, 0
        self._before: dict[signal.Signals, Any] = {}
        self._undo = ExitStack()

    def __enter__(self) -> PreemptionHandler:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other thread
            if self._second is signal.SIG_DFL:
                self._undo.enter_context(_exit_on_second_signal())
            for number in (signal.SIGINT,) if are_several() else _HANDLED:
                self._handle(number, signal.getsignal(number))
        return self

    def check(self) -> None:
        """Raise `Preempted` if a signal was received. All processes must call this the same number of times."""
        self._checks += 1
        if are_several() and self.received is None and multihost_utils.reached_preemption_sync_point(self._checks):
            self.received = signal.SIGTERM
            if self._before:  # JAX handled SIGTERM until now, and does not need it any more
                self._handle(signal.SIGTERM, signal.SIG_DFL)
        if self.received is not None:
            raise Preempted

    def interruptible(self, function: Any, mesh: Mesh) -> Callable[..., Any]:
        """Return a jitted function whose first call raises `Preempted` if a signal is received during compilation.

        Compilation takes minutes, but a preempted machine has seconds to save. The compiler cannot be stopped, so it
        continues in a background thread. Tracing, which takes seconds, is not interrupted: it is Python and
        would compete with saving for the interpreter. With several processes, nothing is interrupted, because they
        must stop together.
        """
        is_compiled = False

        def call(*arguments: Any) -> Any:
            nonlocal is_compiled
            if not is_compiled and not are_several():
                self._compile(function, mesh, arguments)
            is_compiled = True
            return function(*arguments)  # JAX finds the compiled program in its cache

        return call

    def _compile(self, function: Any, mesh: Mesh, arguments: tuple[Any, ...]) -> None:
        done: Future[None] = Future()

        def compile_lowered() -> None:
            try:
                with jax.set_mesh(mesh):  # the mesh is set per thread
                    lowered.compile()
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)

        lowered = function.lower(*arguments)
        thread = threading.Thread(target=compile_lowered, daemon=True)
        thread.start()
        while not wait([done], _POLL_INTERVAL).done:
            if self.received is not None:
                # The interpreter must not shut down while the thread runs. `gpt2 train` ends with os._exit instead.
                atexit.register(thread.join)
                raise Preempted
        done.result()

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def _handle(self, number: signal.Signals, before: Any) -> None:
        self._before[number] = before  # set this first: a signal may arrive at once
        self._undo.callback(signal.signal, number, before)
        signal.signal(number, self._record)

    def _record(self, number: int, frame: FrameType | None) -> None:
        for handled, handler in self._before.items():
            signal.signal(handled, handler if self._second is None else self._second)
        if not are_several():
            self.received = signal.Signals(number)
        elif self.received is None:
            signal.raise_signal(signal.SIGTERM)  # JAX passes it on to the other processes


@contextmanager
def _exit_on_second_signal() -> Iterator[None]:
    """End the process on the second signal, even if the Python handler of the first one has not run yet.

    That happens while the main thread waits for the device in C. Python's C handler writes the number of every signal
    to the wakeup file descriptor, which a thread reads here.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)

    def watch() -> None:
        count = 0
        while number := os.read(read, 1):
            count += number[0] in _HANDLED
            if count == 2:
                os._exit(128 + number[0])
        os.close(read)

    before = signal.set_wakeup_fd(write)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write)

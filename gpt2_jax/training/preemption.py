"""SIGTERM and Ctrl-C end a run where it can save: between two steps, in an evaluation, while a step is compiled.

Where several processes take part, JAX hears SIGTERM, from when they are joined on, of a preemption too, and lets them
agree: all are told at the same of their questions.
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
_LOOK_EVERY = 0.2
"""Seconds."""


class Preempted(Exception):
    """A signal has come: save, and end."""


class PreemptionHandler:
    """A context in which the first SIGINT or SIGTERM is only noted; a second one acts as it did before, or as `second`.

    Python runs a handler between two calls alone. So a program of its own gives signal.SIG_DFL for `second`: then it
    ends at once, whatever it is in.

    Of several processes each may be told, one sooner than another: the first SIGTERM that comes to a process once all
    have agreed to stop may be its first, and is noted too, unless it had Ctrl-C before.
    """

    def __init__(self, second: signal.Handlers | None = None) -> None:
        self.received: signal.Signals | None = None
        self._second, self._questions = second, 0
        self._before: dict[signal.Signals, Any] = {}
        self._undo = ExitStack()

    def __enter__(self) -> PreemptionHandler:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            if self._second is signal.SIG_DFL:
                self._undo.enter_context(_ended_by_the_second())
            for number in (signal.SIGINT,) if are_several() else _HANDLED:
                self._handle(number, signal.getsignal(number))
        return self

    def check(self) -> None:
        """Raise `Preempted` where a signal has come. Every process asks, and as often as the others."""
        self._questions += 1
        if are_several() and self.received is None and multihost_utils.reached_preemption_sync_point(self._questions):
            self.received = signal.SIGTERM
            if self._before:  # until now JAX swallowed each of them, and it has no more use for one
                self._handle(signal.SIGTERM, signal.SIG_DFL)
        if self.received is not None:
            raise Preempted

    def compiled_aside(self, function: Any, mesh: Mesh) -> Callable[..., Any]:
        """`function`, jitted, but that its first call can be left by a signal while it is compiled: raises `Preempted`.

        Compiling takes minutes, and the system gives seconds to save. The compiler cannot be stopped; it goes on in a
        thread that nobody waits for. What is waited for is tracing, which takes seconds, as it is Python and would
        have to share that with what saves; and where there are several processes, all of it: they leave together.
        """
        compiled = False

        def call(*arguments: Any) -> Any:
            nonlocal compiled
            if not compiled and not are_several():
                self._compile(function, mesh, arguments)
            compiled = True
            return function(*arguments)  # which JAX has compiled by now

        return call

    def _compile(self, function: Any, mesh: Mesh, arguments: tuple[Any, ...]) -> None:
        done: Future[None] = Future()

        def compile_lowered() -> None:
            try:
                with jax.set_mesh(mesh):  # each thread has its own
                    lowered.compile()
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)

        lowered = function.lower(*arguments)
        thread = threading.Thread(target=compile_lowered, daemon=True)
        thread.start()
        while not wait([done], _LOOK_EVERY).done:
            if self.received is not None:
                atexit.register(thread.join)  # Python must not end under it; a program that will not wait has os._exit
                raise Preempted
        done.result()

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def _handle(self, number: signal.Signals, before: Any) -> None:
        self._before[number] = before  # first: it may come at once
        self._undo.callback(signal.signal, number, before)
        signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        for handled, handler in self._before.items():
            signal.signal(handled, handler if self._second is None else self._second)
        if not are_several():
            self.received = signal.Signals(number)
        elif self.received is None:
            signal.raise_signal(signal.SIGTERM)  # which JAX tells the other processes


@contextmanager
def _ended_by_the_second() -> Iterator[None]:
    """In which a second signal ends the process also where the handler of the first has not run, as in a call of C that
    waits for the device: Python's own half of the handler, which is C too, writes each into a pipe."""
    heard, write = os.pipe()
    os.set_blocking(write, False)

    def watch() -> None:
        count = 0
        while number := os.read(heard, 1):
            count += number[0] in _HANDLED
            if count == 2:
                os._exit(128 + number[0])
        os.close(heard)

    before = signal.set_wakeup_fd(write)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write)

"""SIGTERM and Ctrl-C end a run between two steps, so that it can save first: all its processes after the same one."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from jax.experimental import multihost_utils

from gpt2_jax.processes import are_several

_HANDLED = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """A context in which the first SIGINT or SIGTERM is only noted; a second one acts as it always does.

    Where several processes take part, JAX hears SIGTERM, from when they are joined on, of a preemption too, and lets
    them agree on a step; a second SIGTERM changes nothing then.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            handled = (signal.SIGINT,) if are_several() else _HANDLED
            self._before = {number: signal.signal(number, self._note) for number in handled}
        return self

    def ends_after(self, step: int) -> bool:
        """Whether the run is to end after this step; every process asks after each."""
        if are_several() and multihost_utils.reached_preemption_sync_point(step):
            self.received = signal.SIGTERM
        return self.received is not None

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        if are_several():
            signal.raise_signal(signal.SIGTERM)  # which JAX tells the other processes
        else:
            self.received = signal.Signals(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave
        self._before = {}

"""Two implementations measured in turns, each in a process of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from gpt2_jax.bench.cases import Case
from gpt2_jax.bench.process import Worker, WorkerDied

SHORTEST_TURN = 0.25
"""Seconds. What takes less is repeated within a turn: single short steps vary by more than implementations differ."""
MOST_REPETITIONS = 100
PAUSE = 0.05
"""Seconds between turns, in which the threads of the one before stop spinning for more work."""

Say = Callable[[str], None]


@dataclass
class Measured:
    """One implementation in one pair. Times are in seconds, memory in bytes."""

    implementation: str
    repetitions: int = 1
    """Within a turn."""
    seconds: list[float] = field(default_factory=list)
    """Of one repetition, turn by turn."""
    first: float | None = None
    """From the start of the process to the end of the first run, imports and compiling included."""
    first_after_imports: float | None = None
    peak_bytes_after_imports: int | None = None
    peak_bytes: int | None = None
    device: str | None = None
    device_peak_bytes: int | None = None
    first_loss: float | None = None
    failure: str | None = None
    """Why it ended early."""


@dataclass
class Pair:
    """Ours and a peer in turns; or ours alone, where there is no peer."""

    measured: list[Measured]
    rates: list[float] = field(default_factory=list)
    """What the device gave between the turns, in units of the case's work a second."""

    @property
    def ratios(self) -> list[float]:
        """How many times as long as ours the peer took, turn by turn."""
        if len(self.measured) < 2:
            return []
        ours, peer = (m.seconds for m in self.measured)
        return [theirs / own for own, theirs in zip(ours, peer, strict=False)]  # one may have died


class Limits:
    """The device's rates, from a worker of their own that is started at the first question."""

    def __init__(self, stack: ExitStack, dtype: str) -> None:
        self._stack, self._dtype = stack, dtype
        self._worker: Worker | None = None
        self.sources: dict[str, str] = {}
        self.failure: str | None = None

    def rate(self, unit: str | None) -> list[float]:
        """FLOP/s for "flops", bytes a second for "bytes"; nothing where it cannot be measured."""
        if unit is None or self.failure is not None:
            return []
        try:
            if self._worker is None:
                self._worker = self._stack.enter_context(Worker("limits"))
                self._worker.ask("import")
            self._worker.ask("prepare", job={"task": unit, "dtype": self._dtype})
            rate, self.sources[unit] = self._worker.ask("run", times=1)["value"]
        except WorkerDied as error:
            self.failure = str(error)
            return []
        return [rate]


def measure(case: Case, names: Sequence[str], pairs: int, limits: Limits, say: Say) -> Pair:
    """Start both, warm them up, and time them alternately; what dies is left out from there on."""
    pair = Pair([Measured(name) for name in names])
    with ExitStack() as stack:
        running: list[_Running] = []
        for measured in pair.measured:
            say(f"{case.title}: {measured.implementation} starts")
            running.append((measured, stack.enter_context(Worker(measured.implementation))))
            _ask_each(running, lambda m, w: _start(case, m, w), only=measured)
        _ask_each(running, _warm_up)
        pair.rates += limits.rate(case.bound_by)
        for turn in range(pairs):
            say(f"{case.title}: {' and '.join(names)}, turn {turn + 1} of {pairs}")
            # Whoever is second in one turn is first in the next.
            order = running if turn % 2 == 0 else running[::-1]
            _ask_each(order, lambda m, w: m.seconds.append(_run(case, w, m.repetitions)))
            running = [entry for entry in running if entry in order]
            pair.rates += limits.rate(case.bound_by)
        _ask_each(running, _finish)
    return pair


_Running = tuple[Measured, Worker]


def _ask_each(running: list[_Running], action: Callable[[Measured, Worker], Any], only: Measured | None = None) -> None:
    """Do it with each in turn; a worker that dies of it takes no further part, and its last word is kept."""
    for entry in [*running]:
        measured, worker = entry
        if only is None or measured is only:
            time.sleep(PAUSE)
            try:
                action(measured, worker)
            except WorkerDied as error:
                measured.failure = str(error)
                running.remove(entry)


def _start(case: Case, measured: Measured, worker: Worker) -> None:
    """The first run, as a user waits for it."""
    measured.peak_bytes_after_imports = worker.ask("import")["peak_bytes"]
    imported = time.perf_counter()
    worker.ask("prepare", job=case.job())
    measured.first_loss = worker.ask("run", times=1)["value"]
    ended = time.perf_counter()
    measured.first, measured.first_after_imports = ended - worker.began, ended - imported


def _warm_up(measured: Measured, worker: Worker) -> None:
    """Run again, which tells how many repetitions make a turn long enough, and then a turn."""
    seconds = worker.ask("run", times=1)["seconds"]
    measured.repetitions = min(MOST_REPETITIONS, math.ceil(SHORTEST_TURN / max(seconds, 1e-9)))
    if measured.repetitions > 1:
        worker.ask("run", times=measured.repetitions)


def _run(case: Case, worker: Worker, times: int) -> float:
    """Seconds of one repetition, after one that does not count: training steps follow each other, and some machines
    take back what a process does not use while it waits for its turn, so that the first would pay to have it again."""
    if case.task in ("train", "forward"):
        worker.ask("run", times=1)
    seconds = worker.ask("run", times=times)["seconds"]
    return seconds / case.length if case.task == "decode" else seconds


def _finish(measured: Measured, worker: Worker) -> None:
    """What a process knows of itself after its last turn."""
    about = worker.ask("about")
    measured.device, measured.peak_bytes = about["device"], about["peak_bytes"]
    measured.device_peak_bytes = about["device_peak_bytes"]

"""Time two implementations alternately, each in its own process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from gpt2_jax.bench.cases import Case
from gpt2_jax.bench.process import Worker, WorkerError

MIN_ROUND_SECONDS = 0.25
"""Shorter units are repeated within a round, because single short steps vary more than the implementations differ."""
MAX_ITERATIONS = 100
PAUSE = 0.05
"""Seconds between rounds. The other process's threads stop spinning in the meantime."""

Say = Callable[[str], None]
"""Displays the current activity."""


@dataclass
class Measurement:
    """One implementation in one comparison."""

    implementation: str
    iterations: int = 1
    """Units per round."""
    seconds: list[float] = field(default_factory=list)
    """Time per unit, for each round."""
    first_run_seconds: float | None = None
    """From process start to the end of the first run, including imports and compilation."""
    first_run_seconds_after_imports: float | None = None
    peak_bytes_after_imports: int | None = None
    peak_bytes: int | None = None
    """Peak resident memory of the process."""
    device: str | None = None
    device_peak_bytes: int | None = None
    first_loss: float | None = None
    failure: str | None = None
    """Why the process ended early."""


@dataclass
class Comparison:
    """Alternating measurements of JAX and a peer, or of JAX alone."""

    measurements: list[Measurement]
    device_rates: list[float] = field(default_factory=list)
    """The device's rate between the rounds, in FLOP/s or bytes/s as the case requires."""

    @property
    def relative_times(self) -> list[float]:
        """The peer's time divided by JAX's, for each round."""
        if len(self.measurements) < 2:
            return []
        jax_seconds, peer_seconds = (m.seconds for m in self.measurements)
        return [peer / own for own, peer in zip(jax_seconds, peer_seconds, strict=False)]  # one may have failed


class DeviceRates:
    """Measures the device's rates in a worker, which starts on first use and ends with `stack`."""

    def __init__(self, stack: ExitStack, dtype: str) -> None:
        self._stack, self._dtype = stack, dtype
        self._worker: Worker | None = None
        self.sources: dict[str, str] = {}
        """Kind of rate -> source of the figure."""
        self.failure: str | None = None

    def measure(self, kind: str | None) -> list[float]:
        """Return the rate in FLOP/s ("flops") or bytes/s ("bytes"), or an empty list if it cannot be measured."""
        if kind is None or self.failure is not None:
            return []
        try:
            if self._worker is None:
                self._worker = self._stack.enter_context(Worker("limits"))
                self._worker.request("import")
            self._worker.request("prepare", job={"task": kind, "dtype": self._dtype})
            rate, self.sources[kind] = self._worker.request("run", iterations=1)["value"]
        except WorkerError as error:
            self.failure = str(error)
            return []
        return [rate]


def compare(case: Case, implementations: Sequence[str], rounds: int, rates: DeviceRates, say: Say) -> Comparison:
    """Start the implementations, warm them up, and time them alternately. One that fails is not run again."""
    comparison = Comparison([Measurement(name) for name in implementations])
    with ExitStack() as stack:
        running: list[_Running] = []
        for measurement in comparison.measurements:
            say(f"{case.title}: starting {measurement.implementation}")
            started = [(measurement, stack.enter_context(Worker(measurement.implementation)))]
            _for_each(started, lambda m, w: _first_run(case, m, w))
            running += started
        _for_each(running, _warm_up)
        comparison.device_rates += rates.measure(case.limited_by)
        for number in range(rounds):
            say(f"{case.title}: {' and '.join(implementations)}, round {number + 1} of {rounds}")
            # The order alternates, so that neither always runs first.
            order = running if number % 2 == 0 else running[::-1]
            _for_each(order, lambda m, w: m.seconds.append(_time_round(case, w, m.iterations)))
            running = [entry for entry in running if entry in order]
            comparison.device_rates += rates.measure(case.limited_by)
        _for_each(running, _finish)
    return comparison


_Running = tuple[Measurement, Worker]


def _for_each(running: list[_Running], action: Callable[[Measurement, Worker], Any]) -> None:
    """Call `action` for every entry. A worker that fails is removed from the list, and the reason is recorded."""
    for entry in [*running]:
        measurement, worker = entry
        time.sleep(PAUSE)
        try:
            action(measurement, worker)
        except WorkerError as error:
            measurement.failure = str(error)
            running.remove(entry)


def _first_run(case: Case, measurement: Measurement, worker: Worker) -> None:
    measurement.peak_bytes_after_imports = worker.request("import")["peak_bytes"]
    imported = time.perf_counter()
    worker.request("prepare", job=case.job())
    measurement.first_loss = worker.request("run", iterations=1)["value"]
    ended = time.perf_counter()
    measurement.first_run_seconds = ended - worker.began
    measurement.first_run_seconds_after_imports = ended - imported


def _warm_up(measurement: Measurement, worker: Worker) -> None:
    """Choose the number of iterations per round from the time of a second run, and run one round."""
    seconds = worker.request("run", iterations=1)["seconds"]
    measurement.iterations = min(MAX_ITERATIONS, math.ceil(MIN_ROUND_SECONDS / max(seconds, 1e-9)))
    if measurement.iterations > 1:
        worker.request("run", iterations=measurement.iterations)


def _time_round(case: Case, worker: Worker, iterations: int) -> float:
    """Time one round. Returns seconds per unit.

    Training and forward passes run once before the clock starts. Some systems reclaim memory from an idle process, and
    the first run pays to get it back. A real training run is never idle, so this cost is excluded.
    """
    if case.task in ("train", "forward"):
        worker.request("run", iterations=1)
    seconds = worker.request("run", iterations=iterations)["seconds"]
    return seconds / case.new_tokens if case.task == "decode" else seconds


def _finish(measurement: Measurement, worker: Worker) -> None:
    info = worker.request("info")
    measurement.device, measurement.peak_bytes = info["device"], info["peak_bytes"]
    measurement.device_peak_bytes = info["device_peak_bytes"]

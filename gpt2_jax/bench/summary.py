"""Statistics of the measurements: medians, relative times, and fractions of the device limit."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gpt2_jax.bench.cases import Case
from gpt2_jax.bench.measure import Comparison, Measurement


@dataclass(frozen=True)
class Summary:
    """One implementation over all of its comparisons: a row of the table."""

    implementation: str
    seconds: list[float]
    """Time per unit, for each round."""
    relative_times: list[float]
    """The time divided by JAX's, for each round. Empty for JAX."""
    tokens_per_second: float | None
    limit_seconds: float | None
    """Time of a unit at the device's median rate. Equal for all implementations of a case."""
    first_run_seconds: float | None
    first_run_seconds_after_imports: float | None
    peak_bytes: int | None
    device_peak_bytes: int | None
    failure: str | None

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def fraction_of_limit(self) -> float | None:
        """Achieved fraction of the device's rate."""
        return None if self.limit_seconds is None or self.median is None else self.limit_seconds / self.median


def summarize(case: Case, comparisons: Sequence[Comparison]) -> list[Summary]:
    """One summary for JAX, from all comparisons, followed by one for each peer."""
    limit = limit_seconds(case, [rate for comparison in comparisons for rate in comparison.device_rates])
    own = _summary(case, [comparison.measurements[0] for comparison in comparisons], [], limit)
    peers = [comparison for comparison in comparisons if len(comparison.measurements) > 1]
    return [own, *(_summary(case, peer.measurements[1:], peer.relative_times, limit) for peer in peers)]


def limit_seconds(case: Case, rates: Sequence[float]) -> float | None:
    """Time of a unit's work at the median of the measured rates."""
    return case.work / statistics.median(rates) if rates and case.work is not None else None


def _summary(
    case: Case, measurements: Sequence[Measurement], relative_times: list[float], limit: float | None
) -> Summary:
    seconds = [s for m in measurements for s in m.seconds]
    return Summary(
        implementation=measurements[0].implementation,
        seconds=seconds,
        relative_times=relative_times,
        tokens_per_second=case.tokens / statistics.median(seconds) if seconds and case.tokens else None,
        limit_seconds=limit,
        first_run_seconds=_median(m.first_run_seconds for m in measurements),
        first_run_seconds_after_imports=_median(m.first_run_seconds_after_imports for m in measurements),
        peak_bytes=_max(m.peak_bytes for m in measurements),
        device_peak_bytes=_max(m.device_peak_bytes for m in measurements),
        failure=next((m.failure for m in measurements if m.failure is not None), None),
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _max(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)

"""Medians, ratios and shares of what was measured: the arithmetic of the table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gpt2_jax.bench.cases import Case
from gpt2_jax.bench.measure import Measured, Pair


@dataclass(frozen=True)
class Summary:
    """One implementation over all of its pairs: a row of the table."""

    implementation: str
    seconds: list[float]
    ratios: list[float]
    """How many times as long as ours it took, turn by turn; none for ours."""
    tokens_per_second: float | None
    bound: float | None
    """Seconds that the work takes at the device's median rate: the same for all of a case."""
    first: float | None
    first_after_imports: float | None
    peak_bytes: int | None
    device_peak_bytes: int | None
    failure: str | None

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def share(self) -> float | None:
        """Of what the device could do."""
        return None if self.bound is None or self.median is None else self.bound / self.median


def summaries(case: Case, pairs: Sequence[Pair]) -> list[Summary]:
    """Ours first, from every pair that it took part in, then each peer."""
    limit = bound(case, [rate for pair in pairs for rate in pair.rates])
    own = _summary(case, [pair.measured[0] for pair in pairs], [], limit)
    return [own, *(_summary(case, pair.measured[1:], pair.ratios, limit) for pair in pairs if len(pair.measured) > 1)]


def bound(case: Case, rates: Sequence[float]) -> float | None:
    """Seconds that a repetition's work takes at the median of the rates that were measured."""
    return case.work / statistics.median(rates) if rates and case.work is not None else None


def _summary(case: Case, measured: Sequence[Measured], ratios: list[float], limit: float | None) -> Summary:
    seconds = [s for m in measured for s in m.seconds]
    return Summary(
        implementation=measured[0].implementation,
        seconds=seconds,
        ratios=ratios,
        tokens_per_second=case.tokens / statistics.median(seconds) if seconds and case.tokens else None,
        bound=limit,
        first=_median(m.first for m in measured),
        first_after_imports=_median(m.first_after_imports for m in measured),
        peak_bytes=_most(m.peak_bytes for m in measured),
        device_peak_bytes=_most(m.device_peak_bytes for m in measured),
        failure=next((m.failure for m in measured if m.failure is not None), None),
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _most(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)

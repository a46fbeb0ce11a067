"""Samples of the cases of parametrized tests, so that `make test` stays short.

A test with the marker `sampled(every)` has many similar cases. `make test` runs one of `every`, and
`make test-thorough` runs all others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest


def mark_thorough(items: Iterable[pytest.Item]) -> None:
    """Add the marker `thorough` to the cases of sampled tests that `make test` leaves out."""
    seen: Counter[str] = Counter()
    for item in items:
        if (sampled := item.get_closest_marker("sampled")) is None:
            continue
        (every,) = sampled.args
        test = item.nodeid.partition("[")[0]
        if seen[test] % every:
            item.add_marker(pytest.mark.thorough)
        seen[test] += 1

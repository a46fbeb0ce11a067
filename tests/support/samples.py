"""Samples of long lists of cases, so that `make test` stays short."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_marked(cases: Iterable[Any], every: int = 6) -> list[Any]:
    """The cases, with the marker `mistakes` on all but one of `every`."""
    return [
        case if index % every == 0 else pytest.param(case, marks=pytest.mark.mistakes)
        for index, case in enumerate(cases)
    ]

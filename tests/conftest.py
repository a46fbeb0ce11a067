"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 in JAX for one test; everywhere else JAX keeps its default of float32."""
    with jax.enable_x64(True):
        yield

"""Comparison of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def assert_same_tensors(found: Mapping[str, Any], expected: Mapping[str, np.ndarray]) -> None:
    """Assert that names, dtypes, shapes and bytes are equal."""
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name

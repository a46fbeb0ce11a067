"""The adapter for lm-evaluation-harness where that is not installed; tests/peers compares its results."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import pytest


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_the_error_without_the_harness_names_the_extra() -> None:
    with pytest.raises(ImportError, match=r"needs lm-evaluation-harness: pip install 'gpt2-bridge\[lm-eval\]'"):
        import_module("gpt2_jax.harness")

"""Checks that `gpt2_torch` and `gpt2_jax` compute the same function. Needs PyTorch."""

from gpt2_jax.parity.checks import CHECKS, checks_for
from gpt2_jax.parity.report import Check, Measurement, Report
from gpt2_jax.parity.verify import verify

__all__ = ["CHECKS", "Check", "Measurement", "Report", "checks_for", "verify"]

"""The proof that `gpt2_jax` is the function that `gpt2_torch` is. Needs torch."""

from gpt2_jax.parity.checks import CHECKS
from gpt2_jax.parity.report import Check, Measurement, Report
from gpt2_jax.parity.verify import verify

__all__ = ["CHECKS", "Check", "Measurement", "Report", "verify"]

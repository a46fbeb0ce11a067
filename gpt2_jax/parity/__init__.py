"""Checks that `gpt2_torch` and `gpt2_jax` compute the same function.

Modules are imported when a name is first used.
"""

from typing import TYPE_CHECKING

from gpt2_jax.lazy_names import lazy_names

if TYPE_CHECKING:
    from gpt2_jax.parity.checks import CHECKS, checks_for
    from gpt2_jax.parity.report import Check, Measurement, Report
    from gpt2_jax.parity.verification import verify
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "gpt2_jax.parity.checks": ("CHECKS", "checks_for"),
            "gpt2_jax.parity.report": ("Check", "Measurement", "Report"),
            "gpt2_jax.parity.verification": ("verify",),
        },
    )

__all__ = ["CHECKS", "Check", "Measurement", "Report", "checks_for", "verify"]

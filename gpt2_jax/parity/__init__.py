"""Checks that `gpt2_torch` and `gpt2_jax` compute the same function, and certificates of the result.

`verify` and `certify` need PyTorch; `verify_against` does not.

Modules are imported when a name is first used.
"""

from typing import TYPE_CHECKING

from gpt2_jax.lazy_names import lazy_names

if TYPE_CHECKING:
    from gpt2_jax.parity.certificates.against import CERTIFIED_CHECKS, verify_against
    from gpt2_jax.parity.certificates.certificate import (
        Certificate,
        CertificateError,
        read_certificate,
        write_certificate,
    )
    from gpt2_jax.parity.certificates.certification import certify
    from gpt2_jax.parity.certificates.signatures import SignatureError, sign, verify_signature
    from gpt2_jax.parity.checks import CHECKS, checks_for
    from gpt2_jax.parity.report import Check, Measurement, Report
    from gpt2_jax.parity.verification import verify
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "gpt2_jax.parity.certificates.against": ("CERTIFIED_CHECKS", "verify_against"),
            "gpt2_jax.parity.certificates.certificate": (
                "Certificate",
                "CertificateError",
                "read_certificate",
                "write_certificate",
            ),
            "gpt2_jax.parity.certificates.certification": ("certify",),
            "gpt2_jax.parity.certificates.signatures": ("SignatureError", "sign", "verify_signature"),
            "gpt2_jax.parity.checks": ("CHECKS", "checks_for"),
            "gpt2_jax.parity.report": ("Check", "Measurement", "Report"),
            "gpt2_jax.parity.verification": ("verify",),
        },
    )

__all__ = [
    "CERTIFIED_CHECKS",
    "CHECKS",
    "Certificate",
    "CertificateError",
    "Check",
    "Measurement",
    "Report",
    "SignatureError",
    "certify",
    "checks_for",
    "read_certificate",
    "sign",
    "verify",
    "verify_against",
    "verify_signature",
    "write_certificate",
]

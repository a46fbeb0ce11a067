"""The JAX model still computes what PyTorch computed when the package's certificate was made. Needs no PyTorch."""

from __future__ import annotations

import bridge
from bridge import BUNDLED
from gpt2_jax.parity import read_certificate, verify_against


def test_the_bundled_certificate_holds() -> None:
    report = verify_against(bridge.load("bundled"), read_certificate(BUNDLED / "parity.certificate"))
    assert report.passed, report.to_json()
    assert not any(check.skipped for check in report.checks)

"""Checks that two implementations compute the same function.

`verify` checks `gpt2_torch` and `gpt2_jax`, and `certify` keeps the result. Both need PyTorch; `verify_against` does
not.
`compare` checks any two implementations of any model: PyTorch modules, Flax modules, JAX functions, and saved goldens.
Of these, only `torch_side` needs PyTorch.

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
    from gpt2_jax.parity.pairs.compare import PAIR_CHECKS, compare
    from gpt2_jax.parity.pairs.matching.layouts import Layout
    from gpt2_jax.parity.pairs.matching.match import Match, Matching, match_names
    from gpt2_jax.parity.pairs.matching.names import MatchError
    from gpt2_jax.parity.pairs.padding import pad_tokens
    from gpt2_jax.parity.pairs.sides.flax_module import linen_side, nnx_side
    from gpt2_jax.parity.pairs.sides.golden import GoldenError, GoldenSide, golden_side, save_golden
    from gpt2_jax.parity.pairs.sides.jax_function import JaxSide, function_side
    from gpt2_jax.parity.pairs.sides.side import Description, Forward, Side, SideError
    from gpt2_jax.parity.pairs.sides.torch_module import TorchSide, torch_side
    from gpt2_jax.parity.pairs.training.compare import compare_training
    from gpt2_jax.parity.pairs.training.diagnosis.evidence import Diagnosis
    from gpt2_jax.parity.pairs.training.optax_trainer import optax_trainer, record_gradients
    from gpt2_jax.parity.pairs.training.result import Departure, TrainingComparison
    from gpt2_jax.parity.pairs.training.torch_trainer import torch_trainer
    from gpt2_jax.parity.pairs.training.trainers import Step, Trainer
    from gpt2_jax.parity.reporting.report import Check, Measurement, Report
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
            "gpt2_jax.parity.pairs.compare": ("PAIR_CHECKS", "compare"),
            "gpt2_jax.parity.pairs.sides.flax_module": ("linen_side", "nnx_side"),
            "gpt2_jax.parity.pairs.sides.golden": ("GoldenError", "GoldenSide", "golden_side", "save_golden"),
            "gpt2_jax.parity.pairs.sides.jax_function": ("JaxSide", "function_side"),
            "gpt2_jax.parity.pairs.matching.layouts": ("Layout",),
            "gpt2_jax.parity.pairs.matching.match": ("Match", "Matching", "match_names"),
            "gpt2_jax.parity.pairs.matching.names": ("MatchError",),
            "gpt2_jax.parity.pairs.padding": ("pad_tokens",),
            "gpt2_jax.parity.pairs.sides.side": ("Description", "Forward", "Side", "SideError"),
            "gpt2_jax.parity.pairs.sides.torch_module": ("TorchSide", "torch_side"),
            "gpt2_jax.parity.pairs.training.compare": ("compare_training",),
            "gpt2_jax.parity.pairs.training.diagnosis.evidence": ("Diagnosis",),
            "gpt2_jax.parity.pairs.training.optax_trainer": (
                "optax_trainer",
                "record_gradients",
            ),
            "gpt2_jax.parity.pairs.training.result": (
                "Departure",
                "TrainingComparison",
            ),
            "gpt2_jax.parity.pairs.training.torch_trainer": ("torch_trainer",),
            "gpt2_jax.parity.pairs.training.trainers": (
                "Step",
                "Trainer",
            ),
            "gpt2_jax.parity.reporting.report": ("Check", "Measurement", "Report"),
            "gpt2_jax.parity.verification": ("verify",),
        },
    )

__all__ = [
    "CERTIFIED_CHECKS",
    "CHECKS",
    "PAIR_CHECKS",
    "Certificate",
    "CertificateError",
    "Check",
    "Departure",
    "Description",
    "Diagnosis",
    "Forward",
    "GoldenError",
    "GoldenSide",
    "JaxSide",
    "Layout",
    "Match",
    "MatchError",
    "Matching",
    "Measurement",
    "Report",
    "Side",
    "SideError",
    "SignatureError",
    "Step",
    "TorchSide",
    "Trainer",
    "TrainingComparison",
    "certify",
    "checks_for",
    "compare",
    "compare_training",
    "function_side",
    "golden_side",
    "linen_side",
    "match_names",
    "nnx_side",
    "optax_trainer",
    "pad_tokens",
    "read_certificate",
    "record_gradients",
    "save_golden",
    "sign",
    "torch_side",
    "torch_trainer",
    "verify",
    "verify_against",
    "verify_signature",
    "write_certificate",
]

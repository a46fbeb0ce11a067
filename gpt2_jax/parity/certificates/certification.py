"""Verify a checkpoint in both backends, and make its certificate. Needs PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from typing import Any

import numpy as np

import bridge
import gpt2_jax.parity.backends.torch_gpt2 as torch_gpt2
from bridge import BridgeError, Checkpoint
from gpt2_jax.parity.certificates.against import verify_against
from gpt2_jax.parity.certificates.certificate import MOST_BYTES, Certificate, certificate_bytes
from gpt2_jax.parity.certificates.sketch import gradient_sketch
from gpt2_jax.parity.inputs import BEYOND_HALF, CheckInputs, choose_tokens, default_length, pad
from gpt2_jax.parity.reporting.report import Report
from gpt2_jax.parity.verification import verify

PACKAGES = ("torch", "jax", "jaxlib", "flax", "numpy")
"""The packages whose versions a certificate states, beside this project's."""


def certify(
    checkpoint: Checkpoint,
    *,
    source: str = "",
    text: str | None = None,
    batch_size: int = 2,
    seq_len: int | None = None,
    seed: int = 0,
    untrained: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> tuple[Report, Certificate | None]:
    """Run all checks of `verify`, make a certificate, and check JAX against it.

    Returns the report and the certificate, or None if a check failed. The report is that of `verify`, or that of
    `verify_against` if only a check of the certificate failed.

    Args:
        checkpoint: a language model.
        source, text, batch_size, seq_len, seed, untrained, progress: as in `verify`. A certificate's rows are longer
            than `seq_len` if more tokens are needed to reach the second half of the model's positions.

    Raises `BridgeError` as `verify` does, and if the certificate would be too large.
    """
    length = certified_length(checkpoint, seq_len)
    size = certificate_bytes(checkpoint.config, (batch_size, length), len(chosen_positions(checkpoint, length)))
    if size > MOST_BYTES:
        raise BridgeError(f"the certificate would have {size} bytes; the limit is {MOST_BYTES}; use fewer sequences")
    report = verify(
        checkpoint,
        source=source,
        text=text,
        batch_size=batch_size,
        seq_len=seq_len,
        seed=seed,
        untrained=untrained,
        progress=progress,
    )
    if not report.passed:
        return report, None
    progress("certificate")
    tokens = choose_tokens(checkpoint, text, (batch_size, length), seed)
    certificate = make_certificate(checkpoint, CheckInputs(checkpoint, tokens))
    certified = verify_against(checkpoint, certificate, source=source)
    if not certified.passed:
        return certified, None
    measured = {"verify": _measured(report), "against": _measured(certified)}
    return report, replace(certificate, measured=measured)


def _measured(report: Report) -> list[dict[str, Any]]:
    """The checks as JSON, without the plots, which would make the file much larger."""
    return [{key: value for key, value in check.to_json().items() if key != "plots"} for check in report.checks]


def make_certificate(checkpoint: Checkpoint, inputs: CheckInputs) -> Certificate:
    """Compute the reference outputs of `gpt2_torch` in float64. `certify` also compares them with JAX's."""
    ids = inputs.ids
    positions = chosen_positions(checkpoint, ids.shape[1])
    padded_ids, padded_mask = pad(inputs.rows_of_different_lengths(), "left")
    none = np.array([], np.int64)
    return Certificate(
        config=checkpoint.config,
        fingerprint=bridge.fingerprint(checkpoint.tensors),
        digests={name: bridge.fingerprint({name: tensor}) for name, tensor in checkpoint.tensors.items()},
        versions={"gpt2-bridge": bridge.__version__, **{name: metadata.version(name) for name in PACKAGES}},
        tokens=inputs.tokens.origin,
        ids=ids,
        positions=positions,
        outputs=torch_gpt2.outputs(checkpoint, ids, None, positions, "float64"),
        gradients=gradient_sketch(torch_gpt2.gradients(checkpoint, ids, "float64")),
        padded_ids=padded_ids,
        padded_mask=padded_mask,
        padded_losses=torch_gpt2.outputs(checkpoint, padded_ids, padded_mask, none, "float64").losses,
    )


def certified_length(checkpoint: Checkpoint, seq_len: int | None) -> int:
    """The tokens of a certificate's rows: enough to reach the second half of the model's positions."""
    n_positions = checkpoint.config.n_positions
    if seq_len is None:
        return default_length(checkpoint.config)
    return min(n_positions, max(seq_len, n_positions // 2 + BEYOND_HALF))


def chosen_positions(checkpoint: Checkpoint, length: int) -> np.ndarray:
    """The positions with logits: the first two, two in the middle, one in the model's second half, and the last."""
    half = checkpoint.config.n_positions // 2
    return np.unique(np.clip([0, 1, length // 4, length // 2, (half + length) // 2, length - 1], 0, length - 1))

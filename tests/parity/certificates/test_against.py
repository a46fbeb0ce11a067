"""`verify_against` accepts the certified function alone, and names what differs."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from support.models import SMALLEST, random_checkpoint

from bridge import Checkpoint
from gpt2_jax.parity import (
    CERTIFIED_CHECKS,
    Certificate,
    CertificateError,
    Check,
    Report,
    tolerances,
    verify_against,
)


def with_config(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    return Checkpoint.of(checkpoint.tensors, replace(checkpoint.config, **changes))


def with_changed_bit(checkpoint: Checkpoint, name: str, bit: int = 0) -> Checkpoint:
    state = {n: np.array(tensor) for n, tensor in checkpoint.tensors.items()}
    state[name].reshape(-1).view(np.uint32)[3] ^= 1 << bit
    return Checkpoint.of(state, checkpoint.config)


def only(report: Report) -> Check:
    (check,) = report.checks
    return check


def test_the_certified_function_passes(checkpoint: Checkpoint, certificate: Certificate) -> None:
    report = verify_against(checkpoint, certificate, source="tiny")
    assert report.passed, report.to_json()
    assert [check.name.replace(" ", "-") for check in report.checks] == [*CERTIFIED_CHECKS]
    assert not any(check.skipped or check.first_divergence for check in report.checks)
    out = io.StringIO()
    report.show(Console(file=out, width=200))
    assert "8 checks hold: the JAX model is the certified function." in out.getvalue()


def test_a_changed_bit_of_a_weight_is_refused_by_name(checkpoint: Checkpoint, certificate: Certificate) -> None:
    changed = with_changed_bit(checkpoint, "h.1.mlp.c_fc.bias")
    check = only(verify_against(changed, certificate, checks=["weights"]))
    assert not check.passed
    assert [(m.value, m.location) for m in check.measurements] == [(1, "h.1.mlp.c_fc.bias")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06 instead of 1e-05"),
        ({"activation_function": "gelu"}, "activation_function='gelu' instead of 'gelu_new'"),
        ({"n_head": 2}, "n_head=2 instead of 3"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False instead of True"),
    ],
)
def test_a_changed_field_is_refused_by_name(
    checkpoint: Checkpoint, certificate: Certificate, changes: dict[str, Any], message: str
) -> None:
    check = only(verify_against(with_config(checkpoint, **changes), certificate, checks=["configuration"]))
    assert not check.passed
    assert check.measurements[0].location == message


def test_settings_of_training_and_equal_widths_may_differ(checkpoint: Checkpoint, certificate: Certificate) -> None:
    other = with_config(checkpoint, resid_pdrop=0.3, initializer_range=0.1)
    assert verify_against(other, certificate, checks=["configuration"]).passed


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "changes", [{"layer_norm_epsilon": 1.001e-5}, {"activation_function": "gelu"}], ids=["epsilon", "activation"]
)
def test_the_outputs_alone_refuse_another_function(
    checkpoint: Checkpoint, certificate: Certificate, changes: dict[str, Any]
) -> None:
    checks = ["logits", "hidden-states", "losses", "gradients", "padding"]
    report = verify_against(with_config(checkpoint, **changes), certificate, checks=checks)
    assert [check.passed for check in report.checks] == [False] * 5
    assert {check.first_divergence for check in report.checks} == {"h.0"}
    assert "NOT the certified function" in report_text(report)


def report_text(report: Report) -> str:
    out = io.StringIO()
    report.show(Console(file=out, width=200))
    return out.getvalue()


def test_the_first_layer_that_departs_is_named(checkpoint: Checkpoint, certificate: Certificate) -> None:
    changed = with_changed_bit(checkpoint, "h.1.attn.c_proj.bias", bit=12)
    check = only(verify_against(changed, certificate, checks=["hidden-states"]))
    assert not check.passed
    assert check.first_divergence == "h.1"


def test_the_stricter_tolerance_applies(checkpoint: Checkpoint, certificate: Certificate) -> None:
    strict = replace(certificate, bounds={**certificate.bounds, "losses": 0.0})
    report = verify_against(checkpoint, strict, checks=["logits", "losses"])
    assert [check.passed for check in report.checks] == [True, False]


@pytest.mark.parametrize(
    ("platform", "precision", "roundoff"),
    [
        ("cpu", "default", 24),
        ("gpu", "highest", 24),
        ("gpu", "default", 11),
        ("tpu", "default", 8),
        ("tpu", "high", 16),
        ("other", "default", 8),
    ],
)
def test_the_float32_tolerance_follows_the_precision_of_the_products(
    platform: str, precision: str, roundoff: int
) -> None:
    found = tolerances.matmul_roundoff(platform, precision)
    assert found == 2.0**-roundoff
    assert tolerances.logits_fp32(10.0, 12, found) == pytest.approx(1e-5 * 2.0 ** (24 - roundoff))
    assert tolerances.kl_fp32(found) == pytest.approx(1e-9 * 4.0 ** (24 - roundoff))


def test_the_report_names_the_precision(
    checkpoint: Checkpoint, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    report = verify_against(checkpoint, certificate, precision="default", checks=["float32"])
    check = only(report)
    assert report.details["float32"] == "matrix products on gpu at precision default: unit round-off 2^-11"
    assert check.measurements[0].tolerance == pytest.approx(1e-5 * 2**13)
    assert check.passed


def test_a_certificate_of_another_model_is_refused_by_field(certificate: Certificate) -> None:
    with pytest.raises(CertificateError, match="other parameters") as error:
        verify_against(random_checkpoint(SMALLEST), certificate)
    assert "vocab_size=11 instead of 61" in str(error.value)
    assert "n_positions=5 instead of 40" in str(error.value)

"""The two numbers that a certificate keeps of each gradient."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_jax.parity.certificates import sketch
from gpt2_jax.parity.certificates.sketch import gradient_sketch


def test_the_signs_never_change() -> None:
    """A certificate holds dot products with them, so later versions must draw the same signs."""
    powers = np.array([2.0**-i for i in range(40)])
    found = gradient_sketch({"wte.weight": powers.reshape(4, 10), "h.0.ln_1.bias": powers})
    assert found[:, 0] == pytest.approx(np.full(2, np.linalg.norm(powers)), rel=1e-15)
    assert found[:, 1].tolist() == [-0.2357893930584396, 0.0042880745877482696]


def test_chunks_do_not_change_the_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    gradient = np.random.default_rng(0).integers(-9, 9, 1000).astype(np.float64)  # integers have exact sums
    whole = gradient_sketch({"x": gradient})
    monkeypatch.setattr(sketch, "_CHUNK", 128)
    assert (gradient_sketch({"x": gradient}) == whole).all()


def test_a_change_of_a_gradient_changes_its_dot_product_by_about_its_norm() -> None:
    rng = np.random.default_rng(0)
    gradients = {f"h.{i}.attn.c_attn.weight": rng.normal(size=(50, 60)) for i in range(100)}
    change = {name: 1e-7 * rng.normal(size=array.shape) for name, array in gradients.items()}
    before, after = gradient_sketch(gradients), gradient_sketch({n: gradients[n] + change[n] for n in gradients})
    ratios = np.abs(after - before)[:, 1] / np.array([np.linalg.norm(change[name]) for name in sorted(change)])
    assert 0.8 < np.sqrt(np.mean(ratios**2)) < 1.2
    assert ratios.max() < 10

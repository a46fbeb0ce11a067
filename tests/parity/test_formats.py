"""Both backends compute the same logits from every format as from the original."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.models import SMALLEST, config_for, random_checkpoint, random_ids

import bridge
import gpt2_jax
from bridge import Checkpoint
from bridge.formats import WRITABLE
from gpt2_torch import GPT2
from gpt2_torch.loading import model_from_checkpoint

CONFIG = replace(SMALLEST, n_head=4, n_inner=None, n_positions=9)
ROUNDING = 1e-5
"""For float32 logits around 3. A stacked model sums in a different order, and so do two threads of XLA."""
IDS = random_ids(CONFIG, batch=2, length=9)


def logits_of_torch(model: GPT2) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).numpy()


def logits_of_jax(model: gpt2_jax.GPT2, params: object) -> np.ndarray:
    return np.asarray(model.apply({"params": params}, jnp.asarray(IDS)))


@cache
def expected(activation: str) -> tuple[Checkpoint, np.ndarray, np.ndarray]:
    checkpoint = random_checkpoint(replace(CONFIG, activation_function=activation))
    in_jax = gpt2_jax.model_from_checkpoint(checkpoint)
    return checkpoint, logits_of_torch(model_from_checkpoint(checkpoint)), logits_of_jax(*in_jax)


@pytest.mark.parametrize("scan", [False, True], ids=["layers", "stacked"])
@pytest.mark.parametrize("format", WRITABLE)
def test_both_backends_compute_the_same_from_every_format(tmp_path: Path, format: str, scan: bool) -> None:
    checkpoint, in_torch, in_jax = expected(config_for(format, CONFIG).activation_function)
    bridge.save(checkpoint, tmp_path / "model", format=format)
    assert np.array_equal(logits_of_torch(GPT2.from_pretrained(tmp_path / "model")), in_torch)
    found = logits_of_jax(*gpt2_jax.from_pretrained(tmp_path / "model", scan=scan))
    np.testing.assert_allclose(found, in_jax, atol=ROUNDING)

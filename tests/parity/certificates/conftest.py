"""A small model and its certificate."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.models import TINY, random_checkpoint

from bridge import Checkpoint
from gpt2_jax.parity import Certificate
from gpt2_jax.parity.inputs import CheckInputs, choose_tokens

CONFIG = replace(TINY, n_layer=2, vocab_size=61, n_embd=24, n_inner=40)


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    return random_checkpoint(CONFIG)


@pytest.fixture(scope="session")
def certificate(checkpoint: Checkpoint) -> Certificate:
    """Needs PyTorch."""
    from gpt2_jax.parity.certificates.certification import make_certificate

    return make_certificate(checkpoint, CheckInputs(checkpoint, choose_tokens(checkpoint, None, (2, 40), 0)))

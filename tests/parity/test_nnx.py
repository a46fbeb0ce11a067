"""The NNX module against the PyTorch model, by the comparison for any two modules."""

from __future__ import annotations

from dataclasses import replace

from support.implementations import torch_model
from support.models import TINY, random_checkpoint, random_ids

import bridge
import gpt2_jax
from gpt2_jax.nnx import GPT2
from gpt2_jax.parity import Match, compare, nnx_side, torch_side


def test_the_twin_is_the_same_function() -> None:
    """Parameters, logits and all gradients agree in float64."""
    checkpoint = random_checkpoint(replace(TINY, n_layer=2, tie_word_embeddings=False))
    model, params = gpt2_jax.model_from_checkpoint(checkpoint)
    twin = GPT2.from_params(model.clone(dtype="float64"), params)
    names = [
        Match(p.torch_name, ".".join(p.flax_path), lambda x, p=p: x.reshape(p.torch_shape), "axes are split")
        for p in bridge.parameters(checkpoint.config)
    ]
    sides = torch_side(torch_model(checkpoint)), nnx_side(twin)
    report = compare(*sides, [random_ids(checkpoint.config)], names=names, dtypes=["float64"])
    assert report.passed, [check for check in report.checks if not check.passed]
    assert {"outputs", "gradients"} <= {check.name for check in report.checks if check.measurements}

"""The port's evaluation, except for its results, which tests/parity/test_evaluation.py compares."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.implementations import jax_model
from support.models import TINY, random_checkpoint, random_ids

import bridge
import gpt2_jax
from gpt2_jax.evaluation import label_scores

SMALL = replace(TINY, n_layer=2)
TEXT = random_ids(SMALL, batch=1, length=150)[0]


def test_one_text_compiles_once_even_with_a_partial_last_window_or_batch() -> None:
    model, params = jax_model(random_checkpoint(SMALL))
    label_scores.clear_cache()
    for length in (150, 149, 97):
        gpt2_jax.evaluate(model, params, TEXT[:length], context=24, stride=10, batch_size=4)
        assert label_scores._cache_size() == 1


def test_bfloat16_computes_the_loss_in_float32() -> None:
    checkpoint = random_checkpoint(SMALL)
    model, params = gpt2_jax.model_from_checkpoint(checkpoint, dtype="bfloat16")
    losses, _ = label_scores(model, False, params, TEXT[None, :20], TEXT[None, 1:21])
    assert losses.dtype == np.float32
    wide = gpt2_jax.evaluate(*jax_model(checkpoint), TEXT)
    assert gpt2_jax.evaluate(model, params, TEXT).loss == pytest.approx(wide.loss, rel=2**-7)  # bfloat16's precision


def test_progress_is_reported_and_invalid_arguments_are_refused() -> None:
    model, params = jax_model(random_checkpoint(SMALL))
    calls: list[tuple[int, int]] = []
    found = gpt2_jax.evaluate(model, params, TEXT, batch_size=4, progress=lambda *call: calls.append(call))
    assert (found.context, found.stride) == (40, 20)
    assert calls == [(4, 7), (7, 7)]
    with pytest.raises(bridge.BridgeError, match=r"stride=9.*context=8"):
        gpt2_jax.evaluate(model, params, TEXT, context=8, stride=9)

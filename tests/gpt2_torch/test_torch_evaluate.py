"""The reference's evaluation, except for its results, which tests/parity/test_evaluation.py compares."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.implementations import torch_model
from support.models import TINY, random_checkpoint, random_ids

import bridge
import gpt2_torch
from gpt2_torch.evaluation import label_scores

SMALL = replace(TINY, n_layer=2)
TEXT = random_ids(SMALL, batch=1, length=150)[0]


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_is_restored(training: bool) -> None:
    checkpoint = random_checkpoint(replace(SMALL, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5))
    model = torch_model(checkpoint).train(training)
    first, second = (gpt2_torch.evaluate(model, TEXT) for _ in range(2))
    assert first == second == gpt2_torch.evaluate(torch_model(random_checkpoint(SMALL)), TEXT)
    assert model.training is training


def test_the_mode_is_restored_after_an_error() -> None:
    model = torch_model(random_checkpoint(SMALL)).train()

    def interrupt(done: int, windows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gpt2_torch.evaluate(model, TEXT, progress=interrupt)
    assert model.training


def test_nothing_is_saved_for_gradients() -> None:
    with torch.autograd.graph.saved_tensors_hooks(pytest.fail, pytest.fail):
        gpt2_torch.evaluate(torch_model(random_checkpoint(SMALL)), TEXT, token_scores=True)


def test_bfloat16_computes_the_loss_in_float32() -> None:
    checkpoint = random_checkpoint(SMALL)
    model = torch_model(checkpoint).bfloat16()
    assert label_scores(model, False, TEXT[None, :20], TEXT[None, 1:21]).nats.dtype == np.float32
    wide = gpt2_torch.evaluate(torch_model(checkpoint), TEXT)
    assert gpt2_torch.evaluate(model, TEXT).loss == pytest.approx(wide.loss, rel=2**-7)  # bfloat16's precision


def test_progress_is_reported_and_invalid_arguments_are_refused() -> None:
    model = torch_model(random_checkpoint(SMALL))
    calls: list[tuple[int, int]] = []
    found = gpt2_torch.evaluate(model, TEXT, batch_size=4, progress=lambda *call: calls.append(call))
    assert (found.context, found.stride) == (40, 20)
    assert calls == [(4, 7), (7, 7)]
    with pytest.raises(bridge.BridgeError, match=r"stride=9.*context=8"):
        gpt2_torch.evaluate(model, TEXT, context=8, stride=9)

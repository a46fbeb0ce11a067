"""Perplexity against the recipe in transformers' documentation, run on transformers' own model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.implementations import jax_model, torch_model, transformers_model
from support.models import TINY, random_checkpoint, random_ids

import bridge.evaluation
import gpt2_jax
import gpt2_torch
from bridge import Checkpoint
from bridge.evaluation import Evaluation, TokenizedText
from gpt2_jax.ops import cross_entropy as jax_cross_entropy
from gpt2_torch.ops import cross_entropy as torch_cross_entropy

FP64 = 1e-12  # relative error of a mean over up to 200 tokens, summed in another order
FP32 = 1e-6  # relative; transformers computes the cross-entropy in float32 whatever the model's dtype

CONFIG = replace(TINY, n_layer=2)
TEXT = random_ids(CONFIG, batch=1, length=201)[0]

SHAPES = [(201, 40, 20), (201, 39, 39), (201, 40, 7), (201, 16, 15), (50, 24, 1)]
SHAPES += [(41, 40, 20), (40, 40, 20), (5, 40, 9), (2, 40, 20)]
"""(tokens, context, stride), among them: exactly one window, one token more, a text shorter than a window."""

Evaluate = Callable[..., Evaluation]
BACKENDS: dict[str, Evaluate] = {
    "gpt2_torch": lambda checkpoint, ids, **kw: gpt2_torch.evaluate(torch_model(checkpoint), ids, **kw),
    "gpt2_jax": lambda checkpoint, ids, **kw: gpt2_jax.evaluate(*jax_model(checkpoint), ids, **kw),
}
each_backend = pytest.mark.parametrize("evaluate", BACKENDS.values(), ids=BACKENDS)
each_shape = pytest.mark.parametrize(("n", "context", "stride"), SHAPES)


def recipe(checkpoint: Checkpoint, ids: np.ndarray, context: int, stride: int) -> tuple[float, float, int]:
    """Follow "Perplexity of fixed-length models" step by step, and collect the sum and count behind its averages.

    Returns the documentation's average, the sum of all predicted tokens' losses, and their number.
    """
    model = transformers_model(checkpoint)
    text = torch.from_numpy(ids)[None]
    weighted_sum, weights, nats, predicted, previous_end = 0.0, 0, 0.0, 0, 0
    for begin in range(0, text.shape[1], stride):
        end = min(begin + context, text.shape[1])
        window = text[:, begin:end]
        labels = window.clone()
        labels[:, : -(end - previous_end)] = -100
        with torch.no_grad():
            mean = float(model(window, labels=labels).loss)
        valid = int((labels != -100).sum())
        weighted_sum, weights = weighted_sum + mean * (valid - 1), weights + valid - 1
        shifted = int((labels[:, 1:] != -100).sum())  # the tokens over which the model averages
        nats, predicted = nats + mean * shifted, predicted + shifted
        previous_end = end
        if end == text.shape[1]:
            break
    return weighted_sum / weights, nats, predicted


@pytest.mark.sampled(3)
@each_shape
@each_backend
def test_the_results_equal_those_of_transformers(evaluate: Evaluate, n: int, context: int, stride: int):
    checkpoint = random_checkpoint(CONFIG)
    average, nats, predicted = recipe(checkpoint, TEXT[:n], context, stride)
    found = evaluate(checkpoint, TEXT[:n], context=context, stride=stride, batch_size=3)
    assert found.predicted_tokens == predicted
    assert found.nats == pytest.approx(nats, rel=FP32)
    assert found.transformers_loss == pytest.approx(average, rel=FP32)
    # exp multiplies the relative error by the loss, about 8
    assert found.perplexity == pytest.approx(math.exp(nats / predicted), rel=10 * FP32)
    if stride == context or n <= context:
        assert found.loss == pytest.approx(found.transformers_loss, rel=FP64)


@each_backend
def test_a_last_window_of_one_token_predicts_nothing(evaluate: Evaluate):
    """With windows that do not overlap, the recipe's mean over no tokens would make the whole average NaN."""
    checkpoint, ids = random_checkpoint(CONFIG), TEXT[:81]
    assert math.isnan(recipe(checkpoint, ids, 40, 40)[0])
    found, shorter = (evaluate(checkpoint, text, context=40, stride=40) for text in (ids, ids[:80]))
    assert (found.windows, shorter.windows) == (3, 2)
    assert found.predicted_tokens == shorter.predicted_tokens == 78
    assert found.loss == pytest.approx(shorter.loss, rel=FP32)
    assert found.transformers_loss == pytest.approx(shorter.loss, rel=FP32)


@pytest.mark.parametrize("form", [{}, {"scan": True}, {"vocab_multiple": 64}], ids=["layers", "scanned", "padded"])
def test_the_port_agrees_with_the_reference_in_float64(x64: None, form: dict[str, Any]):
    checkpoint, windows = random_checkpoint(CONFIG, np.float64), {"context": 40, "stride": 13, "batch_size": 4}
    reference = gpt2_torch.evaluate(torch_model(checkpoint), TEXT, **windows)
    port = gpt2_jax.evaluate(*jax_model(checkpoint, **form), TEXT, **windows)
    assert port.nats == pytest.approx(reference.nats, rel=FP64)
    assert port.transformers_loss == pytest.approx(reference.transformers_loss, rel=FP64)
    assert replace(port, nats=0.0, transformers_loss=0.0) == replace(reference, nats=0.0, transformers_loss=0.0)


@each_backend
def test_each_token_is_predicted_from_its_window(evaluate: Evaluate, x64: None):
    """Compute each token in a separate row, which starts where its window starts."""
    checkpoint, context, stride = random_checkpoint(CONFIG, np.float64), 16, 5
    model = transformers_model(checkpoint)
    losses = []
    for p in range(1, 60):
        begin = stride * max(0, math.ceil((p + 1 - context) / stride))
        with torch.no_grad():
            logits = model(torch.from_numpy(TEXT[begin:p])[None]).logits[0, -1]
        losses.append(-float(logits.log_softmax(dim=-1)[TEXT[p]]))
    found = evaluate(checkpoint, TEXT[:60], context=context, stride=stride)
    assert found.loss == pytest.approx(np.mean(losses), rel=FP64)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=10 * FP64)


@pytest.mark.sampled(3)
@each_backend
def test_the_scores_of_tokens_add_up_and_have_the_ranks_of_the_logits(evaluate: Evaluate, x64: None):
    checkpoint = random_checkpoint(CONFIG, np.float64)
    found = evaluate(checkpoint, TEXT, context=40, stride=20, token_scores=True)
    scores = found.token_scores
    assert np.nansum(scores.nats) == pytest.approx(found.nats, rel=FP64)
    with torch.no_grad():
        logits = transformers_model(checkpoint)(torch.from_numpy(TEXT[:40])[None]).logits[0].numpy()
    labels = TEXT[1:40]
    np.testing.assert_array_equal(scores.ranks[:40], [0, *(1 + (logits[range(39), labels] < logits[:-1].T).sum(0))])
    losses = -(torch.from_numpy(logits[:-1]).log_softmax(-1).numpy())[range(39), labels]
    np.testing.assert_allclose(scores.nats[1:40], losses, rtol=1e-10)


@each_backend
def test_each_record_is_evaluated_alone_and_only_where_it_counts(evaluate: Evaluate):
    checkpoint, ids = random_checkpoint(CONFIG), TEXT[:30]
    counts = np.arange(30) % 3 > 0
    settings = {"context": 8, "stride": 5, "batch_size": 1, "token_scores": True}
    found = evaluate(checkpoint, TokenizedText(ids, counts, np.array([12, 30])), **settings)
    alone = [evaluate(checkpoint, part, **settings).token_scores.nats for part in (ids[:12], ids[12:])]
    expected = np.where(counts, np.concatenate(alone), np.nan)
    np.testing.assert_allclose(found.token_scores.nats, expected, rtol=1e-5)
    assert found.nats == pytest.approx(np.nansum(expected), rel=FP32)
    assert found.predicted_tokens == np.isfinite(expected).sum() == 20


@each_backend
@pytest.mark.parametrize("batch_size", [1, 2, 9, 100])
def test_the_batch_size_does_not_matter(evaluate: Evaluate, batch_size: int, x64: None):
    checkpoint = random_checkpoint(CONFIG, np.float64)
    found = evaluate(checkpoint, TEXT, context=40, stride=20, batch_size=batch_size)
    assert found.windows == 10
    assert found.nats == pytest.approx(evaluate(checkpoint, TEXT, context=40, stride=20).nats, rel=FP64)


def test_there_is_one_ignored_label():
    modules = (bridge, bridge.evaluation, jax_cross_entropy, torch_cross_entropy)
    assert len({module.IGNORE_INDEX for module in modules}) == 1

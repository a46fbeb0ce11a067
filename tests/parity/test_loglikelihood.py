"""`bridge.loglikelihood` against the logits of transformers' model, which computes one pair at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.implementations import Decoders, decoders_of, each_backend, transformers_model
from support.models import TINY, random_checkpoint

import bridge

CONFIG = replace(TINY, n_layer=2)
P = CONFIG.n_positions
FP32 = 1e-4  # nats; a sum over up to 40 tokens, each with an error of some 1e-6

Ids = Sequence[int]


def random_pairs() -> list[tuple[Ids, Ids]]:
    """Return pairs of different lengths. The last three fill or exceed the positions."""
    rng = np.random.default_rng(0)
    lengths = [(1, 1), (1, 3), (5, 1), (7, 2), (5, 9), (P - 1, 2), (P, 9), (1, P)]
    return [(rng.integers(0, 257, n).tolist(), rng.integers(0, 257, m).tolist()) for n, m in lengths]


@pytest.fixture(scope="module")
def decoders() -> Decoders:
    return decoders_of(random_checkpoint(CONFIG))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return transformers_model(random_checkpoint(CONFIG))


def logprobs(model: torch.nn.Module, ids: Ids) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([[*ids]])).logits[0].double().log_softmax(-1).numpy()


def expected(model: torch.nn.Module, context: Ids, continuation: Ids) -> tuple[float, bool]:
    ids = [*context, *continuation][-(P + 1) :]
    found = logprobs(model, ids[:-1])[-len(continuation) :]
    logprob = found[np.arange(len(continuation)), continuation].sum()
    return float(logprob), bool((found.argmax(-1) == continuation).all())


@each_backend
def test_the_log_probabilities_equal_those_of_transformers(
    backend: str, decoders: Decoders, model: torch.nn.Module
) -> None:
    pairs = random_pairs()
    greedy = [int(logprobs(model, context)[-1].argmax()) for context, _ in pairs[:4]]
    pairs += [(context, [token]) for (context, _), token in zip(pairs[:4], greedy, strict=True)]
    found = bridge.loglikelihood(decoders[backend], pairs)
    for one, pair in zip(found, pairs, strict=True):
        logprob, is_greedy = expected(model, *pair)
        assert one.logprob == pytest.approx(logprob, abs=FP32)
        assert (one.is_greedy, one.num_tokens) == (is_greedy, len(pair[1]))
    assert [one.is_greedy for one in found[-4:]] == [True] * 4
    assert not all(one.is_greedy for one in found)

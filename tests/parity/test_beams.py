"""Beam search: the same from both backends and from transformers, and the best there is where it can see all."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.implementations import jax_model, torch_model, transformers_model
from support.models import TINY, random_checkpoint, random_ids

import bridge
from bridge import Checkpoint, GPT2Config
from bridge.generation.config import GenerationConfig
from bridge.generation.decoder import Decoder
from gpt2_jax.generation import Decoder as JaxDecoder
from gpt2_torch.generation import Decoder as TorchDecoder

pytestmark = pytest.mark.usefixtures("quick_compilation")

LOG_PROB_ROUNDING = 2e-5
"""Nats. Logits are about 20 and rounded at 2e-6 of that, each in sums that have another order alone than in a batch."""

SMALL = replace(TINY, n_layer=2)  # as many as can differ: compiling is what costs time here
NEW_TOKENS = 10
PROMPTS = [random_ids(SMALL, 1, length, seed=length)[0].tolist() for length in (5, 3)]
FEW_TOKENS = GPT2Config(vocab_size=11, n_positions=40, n_embd=16, n_layer=1, n_head=2, n_inner=20)

Decoders = Mapping[str, Decoder[Any, Any]]
each_backend = pytest.mark.parametrize("backend", ["gpt2_torch", "gpt2_jax"])


def decoders_of(checkpoint: Checkpoint) -> Decoders:
    return {"gpt2_torch": TorchDecoder(torch_model(checkpoint)), "gpt2_jax": JaxDecoder(*jax_model(checkpoint))}


@pytest.fixture(scope="module")
def small(quick_compilation: None) -> Decoders:
    return decoders_of(random_checkpoint(SMALL))


def ids_of_transformers(model: Any, prompt: list[int], request: GenerationConfig) -> list[list[int]]:
    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        num_beams=request.beams,
        num_return_sequences=request.samples,
        max_new_tokens=request.max_new_tokens,
        length_penalty=request.length_penalty,
        early_stopping=False,
        pad_token_id=0,
        eos_token_id=[*request.stop_ids] or None,
    )
    rows = [row[len(prompt) :] for row in found.tolist()]
    ends = [min((n for n, token in enumerate(row, 1) if token in request.stop_ids), default=len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def ids(decoder: Decoder[Any, Any], prompts: list[list[int]], request: GenerationConfig) -> list[list[list[int]]]:
    return [[continuation.ids for continuation in row] for row in decoder.generate(prompts, request)]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("stops", [False, True], ids=["without a stop id", "with one"])
def test_all_implementations_find_the_same_texts(stops: bool, length_penalty: float, small: Decoders) -> None:
    request = GenerationConfig(NEW_TOKENS, beams=4, samples=3, length_penalty=length_penalty)
    if stops:  # tokens in the middle of the texts that are found without
        free = ids(small["gpt2_torch"], PROMPTS, request)
        request = replace(request, stop_ids=(free[0][0][4], free[1][0][6]))
    peer = transformers_model(random_checkpoint(SMALL))
    expected = [ids_of_transformers(peer, prompt, request) for prompt in PROMPTS]
    for name, decoder in small.items():
        assert ids(decoder, PROMPTS, request) == expected, name
    ended = [row for rows in expected for row in rows if row[-1] in request.stop_ids]
    assert bool(ended) == stops
    greedy = small["gpt2_torch"].generate(PROMPTS, GenerationConfig(NEW_TOKENS))
    assert any(rows[0] != only.ids for rows, [only] in zip(expected, greedy, strict=True)), "a search that finds more"


def test_all_implementations_find_the_same_texts_with_trained_weights() -> None:
    checkpoint = bridge.load("bundled")
    prompt = checkpoint.tokenizer().encode_ordinary("KING RICHARD III:\n")
    [newline] = checkpoint.tokenizer().encode_ordinary("\n")
    request = GenerationConfig(16, beams=4, samples=4, stop_ids=(newline,))
    expected = ids_of_transformers(transformers_model(checkpoint), prompt, request)
    assert any(len(row) < 16 for row in expected)
    for name, decoder in decoders_of(checkpoint).items():
        assert ids(decoder, [prompt], request) == [expected], name


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_the_search_is_over_when_it_is_in_transformers(length_penalty: float) -> None:
    """With so few tokens every search ends by the rule of when it may, which has its corners; torch alone, for time."""
    for seed in range(13):
        checkpoint = random_checkpoint(FEW_TOKENS, seed=seed)
        decoder, peer = TorchDecoder(torch_model(checkpoint)), transformers_model(checkpoint)
        prompt = random_ids(FEW_TOKENS, 1, 3, seed)[0].tolist()
        request = GenerationConfig(12, beams=2, samples=2, stop_ids=(7,), length_penalty=length_penalty)
        assert ids(decoder, [prompt], request) == [ids_of_transformers(peer, prompt, request)], seed


def likeliest_of_all(
    checkpoint: Checkpoint, prompt: list[int], request: GenerationConfig
) -> list[tuple[float, list[int]]]:
    """Every text that there is, with its rank, best first."""
    model, found = torch_model(checkpoint), {}
    for new in itertools.product(range(checkpoint.config.vocab_size), repeat=request.max_new_tokens):
        end = min((n for n, token in enumerate(new, 1) if token in request.stop_ids), default=len(new))
        with torch.no_grad():
            log_probs = model(torch.tensor([[*prompt, *new[:end]]]))[0].log_softmax(-1).numpy()
        total = sum(float(log_probs[len(prompt) - 1 + n, token]) for n, token in enumerate(new[:end]))
        found[new[:end]] = total / end**request.length_penalty
    return sorted(((rank, [*new]) for new, rank in found.items()), reverse=True)


@each_backend
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("stop_ids", [(), (3,)])
def test_beams_for_all_beginnings_find_the_best_of_all_texts(
    stop_ids: tuple[int, ...], length_penalty: float, backend: str
) -> None:
    """V beams keep every beginning of texts of two tokens."""
    config = replace(FEW_TOKENS, vocab_size=7)
    checkpoint = random_checkpoint(config, seed=4)
    beams = config.vocab_size - len(stop_ids)
    request = GenerationConfig(
        2, beams=beams, samples=4, stop_ids=stop_ids, length_penalty=length_penalty, log_probs=True
    )
    [found] = decoders_of(checkpoint)[backend].generate([[1, 5, 2]], request)
    best = likeliest_of_all(checkpoint, [1, 5, 2], request)[:4]
    assert [continuation.ids for continuation in found] == [new for _, new in best]
    ranks = [sum(c.log_probs or []) / len(c.ids) ** length_penalty for c in found]
    np.testing.assert_allclose(ranks, [rank for rank, _ in best], rtol=0, atol=LOG_PROB_ROUNDING)


@each_backend
@pytest.mark.parametrize("stop_ids", [(), tuple(range(0, SMALL.vocab_size, 20))], ids=["no stop ids", "many"])
def test_a_row_is_what_it_is_alone(stop_ids: tuple[int, ...], backend: str, small: Decoders) -> None:
    request = GenerationConfig(NEW_TOKENS, beams=3, samples=3, log_probs=True, stop_ids=stop_ids)
    together = small[backend].generate(PROMPTS, request)
    for prompt, row in zip(PROMPTS, together, strict=True):
        [alone] = small[backend].generate([prompt], request)
        assert [c.ids for c in row] == [c.ids for c in alone]
        for ours, expected in zip(row, alone, strict=True):
            np.testing.assert_allclose(ours.log_probs, expected.log_probs, rtol=0, atol=LOG_PROB_ROUNDING)
            assert ours.log_probs is not None
            assert len(ours.log_probs) == len(ours.ids)


@each_backend
def test_log_probabilities_are_the_models_own(backend: str, small: Decoders) -> None:
    model = torch_model(random_checkpoint(SMALL))
    request = GenerationConfig(NEW_TOKENS, beams=3, samples=3, log_probs=True)
    for prompt, row in zip(PROMPTS, small[backend].generate(PROMPTS, request), strict=True):
        for continuation in row:
            whole = torch.tensor([*prompt, *continuation.ids])
            with torch.no_grad():
                log_probs = model(whole[None])[0].log_softmax(-1)[len(prompt) - 1 : -1]
            expected = log_probs.gather(1, whole[len(prompt) :, None])[:, 0].numpy()
            np.testing.assert_allclose(continuation.log_probs, expected, rtol=0, atol=LOG_PROB_ROUNDING)


@each_backend
def test_nothing_asked_for_is_nothing_given(backend: str, small: Decoders) -> None:
    assert ids(small[backend], PROMPTS, GenerationConfig(0, beams=3, samples=2)) == [[[], []]] * 2
    assert ids(small[backend], [], GenerationConfig(3, beams=3)) == []

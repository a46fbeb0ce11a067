"""Beam search: equal in both backends and transformers, and optimal if the beams cover all texts."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.implementations import Decoders, decoders_of, each_backend, torch_model, transformers_model
from support.models import TINY, random_checkpoint, random_ids

import bridge
from bridge import Checkpoint, GPT2Config
from bridge.generation.config import GenerationConfig
from bridge.generation.decoder import Decoder
from gpt2_torch.generation import Decoder as TorchDecoder

pytestmark = pytest.mark.usefixtures("quick_compilation")

LOGPROB_ROUNDING = 2e-5
"""Nats. Logits are about 20 with a rounding of 2e-6 of that. Sums have another order in a batch than alone."""

SMALL = replace(TINY, n_layer=2)  # enough for layers to differ; more layers take longer to compile
NEW_TOKENS = 10
PROMPTS = [random_ids(SMALL, 1, length, seed=length)[0].tolist() for length in (5, 3)]
PROCESSORS: dict[str, Any] = {"no_repeat_ngram_size": 1, "repetition_penalty": 1.2, "sequence_bias": [((3,), 4.0)]}
FEW_TOKENS = GPT2Config(vocab_size=11, n_positions=40, n_embd=16, n_layer=1, n_head=2, n_inner=20)


@pytest.fixture(scope="module")
def small(quick_compilation: None) -> Decoders:
    return decoders_of(random_checkpoint(SMALL))


def ids_of_transformers(model: Any, prompt: list[int], generation_config: GenerationConfig) -> list[list[int]]:
    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        num_beams=generation_config.num_beams,
        num_return_sequences=generation_config.num_return_sequences,
        max_new_tokens=generation_config.max_new_tokens,
        length_penalty=generation_config.length_penalty,
        early_stopping=generation_config.early_stopping,
        pad_token_id=0,
        eos_token_id=[*generation_config.eos_token_ids] or None,
    )
    rows = [row[len(prompt) :] for row in found.tolist()]
    ends = [
        min((n for n, token in enumerate(row, 1) if token in generation_config.eos_token_ids), default=len(row))
        for row in rows
    ]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def ids(
    decoder: Decoder[Any, Any], prompts: list[list[int]], generation_config: GenerationConfig
) -> list[list[list[int]]]:
    return [[continuation.ids for continuation in row] for row in decoder.generate(prompts, generation_config)]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("stops", [False, True], ids=["without a stop id", "with one"])
def test_all_implementations_find_the_same_texts(stops: bool, length_penalty: float, small: Decoders) -> None:
    generation_config = GenerationConfig(NEW_TOKENS, num_beams=4, num_return_sequences=3, length_penalty=length_penalty)
    if stops:  # tokens in the middle of the texts found without them
        free = ids(small["gpt2_torch"], PROMPTS, generation_config)
        generation_config = replace(generation_config, eos_token_id=(free[0][0][4], free[1][0][6]))
    peer = transformers_model(random_checkpoint(SMALL))
    expected = [ids_of_transformers(peer, prompt, generation_config) for prompt in PROMPTS]
    for name, decoder in small.items():
        assert ids(decoder, PROMPTS, generation_config) == expected, name
    ended = [row for rows in expected for row in rows if row[-1] in generation_config.eos_token_ids]
    assert bool(ended) == stops
    greedy = small["gpt2_torch"].generate(PROMPTS, GenerationConfig(NEW_TOKENS))
    assert any(rows[0] != only.ids for rows, [only] in zip(expected, greedy, strict=True)), (
        "greedy search finds other texts"
    )


def test_all_implementations_find_the_same_texts_with_trained_weights() -> None:
    checkpoint = bridge.load("bundled")
    prompt = checkpoint.tokenizer().encode("KING RICHARD III:\n", special_tokens="as_text")
    [newline] = checkpoint.tokenizer().encode("\n", special_tokens="as_text")
    generation_config = GenerationConfig(16, num_beams=4, num_return_sequences=4, eos_token_id=(newline,))
    expected = ids_of_transformers(transformers_model(checkpoint), prompt, generation_config)
    assert any(len(row) < 16 for row in expected)
    for name, decoder in decoders_of(checkpoint).items():
        assert ids(decoder, [prompt], generation_config) == [expected], name


@pytest.mark.sampled(3)
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-0.5, 0.0, 1.0, 2.0])
def test_the_search_ends_when_it_does_in_transformers(length_penalty: float, early_stopping: Any) -> None:
    """With few tokens, every search ends by the stopping rule, which has edge cases. Only torch, to save time."""
    for seed in range(13):
        checkpoint = random_checkpoint(FEW_TOKENS, seed=seed)
        decoder, peer = TorchDecoder(torch_model(checkpoint)), transformers_model(checkpoint)
        prompt = random_ids(FEW_TOKENS, 1, 3, seed)[0].tolist()
        generation_config = GenerationConfig(
            12,
            num_beams=2,
            num_return_sequences=2,
            eos_token_id=(7,),
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
        assert ids(decoder, [prompt], generation_config) == [ids_of_transformers(peer, prompt, generation_config)], seed


def best_of_all(
    checkpoint: Checkpoint, prompt: list[int], generation_config: GenerationConfig
) -> list[tuple[float, list[int]]]:
    """Return every possible text with its rank, best first."""
    model, found = torch_model(checkpoint), {}
    for new in itertools.product(range(checkpoint.config.vocab_size), repeat=generation_config.max_new_tokens):
        end = min((n for n, token in enumerate(new, 1) if token in generation_config.eos_token_ids), default=len(new))
        with torch.no_grad():
            logprobs = model(torch.tensor([[*prompt, *new[:end]]]))[0].log_softmax(-1).numpy()
        total = sum(float(logprobs[len(prompt) - 1 + n, token]) for n, token in enumerate(new[:end]))
        found[new[:end]] = total / end**generation_config.length_penalty
    return sorted(((rank, [*new]) for new, rank in found.items()), reverse=True)


@each_backend
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("eos_token_ids", [(), (3,)])
def test_beams_that_cover_all_first_tokens_find_the_best_of_all_texts(
    eos_token_ids: tuple[int, ...], length_penalty: float, backend: str
) -> None:
    """With V beams and texts of two tokens, every first token is kept."""
    config = replace(FEW_TOKENS, vocab_size=7)
    checkpoint = random_checkpoint(config, seed=4)
    beams = config.vocab_size - len(eos_token_ids)
    generation_config = GenerationConfig(
        2,
        num_beams=beams,
        num_return_sequences=4,
        eos_token_id=eos_token_ids,
        length_penalty=length_penalty,
        logprobs=True,
    )
    [found] = decoders_of(checkpoint)[backend].generate([[1, 5, 2]], generation_config)
    best = best_of_all(checkpoint, [1, 5, 2], generation_config)[:4]
    assert [continuation.ids for continuation in found] == [new for _, new in best]
    ranks = [sum(c.logprobs or []) / len(c.ids) ** length_penalty for c in found]
    np.testing.assert_allclose(ranks, [rank for rank, _ in best], rtol=0, atol=LOGPROB_ROUNDING)


@pytest.mark.sampled(3)
@each_backend
@pytest.mark.parametrize("eos_token_ids", [(), tuple(range(0, SMALL.vocab_size, 20))], ids=["no stop ids", "many"])
@pytest.mark.parametrize("processors", [{}, PROCESSORS], ids=["plain", "processors"])
def test_a_row_does_not_depend_on_the_others(
    processors: dict[str, Any], eos_token_ids: tuple[int, ...], backend: str, small: Decoders
) -> None:
    generation_config = GenerationConfig(
        NEW_TOKENS, num_beams=3, num_return_sequences=3, logprobs=True, eos_token_id=eos_token_ids, **processors
    )
    together = small[backend].generate(PROMPTS, generation_config)
    for prompt, row in zip(PROMPTS, together, strict=True):
        [alone] = small[backend].generate([prompt], generation_config)
        assert [c.ids for c in row] == [c.ids for c in alone]
        for ours, expected in zip(row, alone, strict=True):
            np.testing.assert_allclose(ours.logprobs, expected.logprobs, rtol=0, atol=LOGPROB_ROUNDING)
            assert ours.logprobs is not None
            assert len(ours.logprobs) == len(ours.ids)


@each_backend
def test_log_probabilities_are_the_models_own(backend: str, small: Decoders) -> None:
    """They are those before the processors."""
    model = torch_model(random_checkpoint(SMALL))
    generation_config = GenerationConfig(NEW_TOKENS, num_beams=3, num_return_sequences=3, logprobs=True, **PROCESSORS)
    for prompt, row in zip(PROMPTS, small[backend].generate(PROMPTS, generation_config), strict=True):
        for continuation in row:
            whole = torch.tensor([*prompt, *continuation.ids])
            with torch.no_grad():
                logprobs = model(whole[None])[0].log_softmax(-1)[len(prompt) - 1 : -1]
            expected = logprobs.gather(1, whole[len(prompt) :, None])[:, 0].numpy()
            np.testing.assert_allclose(continuation.logprobs, expected, rtol=0, atol=LOGPROB_ROUNDING)


@each_backend
@pytest.mark.parametrize("eos_token_id", [None, 7])
def test_of_equal_scores_the_lowest_ids_are_kept(eos_token_id: int | None, backend: str) -> None:
    """All logits of a model of zeros are equal. transformers takes the order of `topk`, which is not defined."""
    checkpoint = random_checkpoint(SMALL)
    zeros = Checkpoint.of({name: np.zeros_like(x) for name, x in checkpoint.tensors.items()}, SMALL)
    config = GenerationConfig(3, num_beams=3, num_return_sequences=3, eos_token_id=eos_token_id)
    found = ids(decoders_of(zeros)[backend], [[5, 6]], config)[0]
    assert found == [[0, 0, 0], [0, 0, 1], [0, 0, 2]]


@each_backend
def test_of_equal_forced_ends_the_lowest_is_taken(backend: str, small: Decoders) -> None:
    config = GenerationConfig(4, num_beams=2, forced_eos_token_id=(59, 48, 6))
    assert ids(small[backend], PROMPTS[:1], config)[0][0][-1] == 6


@each_backend
def test_no_tokens_or_no_prompts_give_no_output(backend: str, small: Decoders) -> None:
    assert ids(small[backend], PROMPTS, GenerationConfig(0, num_beams=3, num_return_sequences=2)) == [[[], []]] * 2
    assert ids(small[backend], [], GenerationConfig(3, num_beams=3)) == []

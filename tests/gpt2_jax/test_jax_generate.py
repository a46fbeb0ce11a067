"""Sampling from the port, and that greedy tokens are the same everywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from implementations import jax_model, torch_model, transformers_model
from models import TINY, random_checkpoint, random_ids

import gpt2_torch
from gpt2_jax import GPT2, generate, model_from_checkpoint
from gpt2_jax.generate import SHORTEST_BUCKET, _fill

SMALL = replace(TINY, n_layer=2)  # as many as can differ: compiling is what costs time here
PROMPTS = random_ids(SMALL, batch=3, length=4)


@pytest.fixture(scope="module")
def model_and_params() -> tuple[GPT2, dict[str, Any]]:
    return jax_model(random_checkpoint(SMALL))


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, tie_word_embeddings=False, scale_attn_by_inverse_layer_idx=True, activation_function="relu"),
    ],
    ids=["gpt2", "untied-inverse-relu"],
)
def test_greedy_tokens_are_the_same_in_every_implementation(config: Any):
    checkpoint = random_checkpoint(config)
    expected = gpt2_torch.generate(torch_model(checkpoint), torch.from_numpy(PROMPTS), max_new_tokens=12).numpy()
    for form in ({}, {"scan": True}, {"vocab_multiple": 64}):
        np.testing.assert_array_equal(generate(*jax_model(checkpoint, **form), PROMPTS, max_new_tokens=12), expected)
    peer = transformers_model(checkpoint).generate(
        torch.from_numpy(PROMPTS),
        attention_mask=torch.ones(PROMPTS.shape, dtype=torch.long),
        do_sample=False,
        max_new_tokens=12,
        min_new_tokens=None,
        eos_token_id=-1,
        pad_token_id=0,
    )
    np.testing.assert_array_equal(peer.numpy(), expected)


def test_the_seed_decides_the_tokens(model_and_params: tuple[GPT2, dict[str, Any]]):
    first, same, other = (
        np.asarray(generate(*model_and_params, PROMPTS, max_new_tokens=9, temperature=1.0, seed=seed))
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, same)
    assert first.shape == (3, 13)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(first[:, :4], PROMPTS)


def test_one_candidate_is_greedy(model_and_params: tuple[GPT2, dict[str, Any]]):
    sampled = generate(*model_and_params, PROMPTS, max_new_tokens=9, temperature=5.0, top_k=1)
    np.testing.assert_array_equal(sampled, generate(*model_and_params, PROMPTS, max_new_tokens=9))


def test_only_the_likeliest_k_are_sampled(model_and_params: tuple[GPT2, dict[str, Any]]):
    model, params = model_and_params
    ids = generate(model, params, PROMPTS, max_new_tokens=20, temperature=9.0, top_k=3)
    candidates = jax.lax.top_k(jax.jit(model.apply)({"params": params}, ids)[:, 3:-1], 3)[1]
    assert (candidates == ids[:, 4:, None]).any(axis=-1).all()
    assert not (candidates[..., 0] == ids[:, 4:]).all()


def test_more_than_the_positions_is_refused(model_and_params: tuple[GPT2, dict[str, Any]]):
    assert generate(*model_and_params, PROMPTS, max_new_tokens=36).shape == (3, SMALL.n_positions)
    with pytest.raises(ValueError, match=r"41 tokens.*n_positions=40"):
        generate(*model_and_params, PROMPTS, max_new_tokens=37)


def test_prompts_that_cannot_be_continued_are_refused(model_and_params: tuple[GPT2, dict[str, Any]]):
    with pytest.raises(ValueError, match="empty"):
        generate(*model_and_params, PROMPTS[:, :0], max_new_tokens=1)
    with pytest.raises(IndexError, match="vocabulary"):
        generate(*model_and_params, PROMPTS + SMALL.vocab_size, max_new_tokens=1)


def test_one_compilation_serves_a_power_of_two_of_lengths():
    config = replace(SMALL, n_positions=128, n_layer=1)
    model, params = jax_model(random_checkpoint(config))
    _fill.clear_cache()

    def compilations_after(length: int, max_new_tokens: int, **kwargs: Any) -> int:
        ids = jnp.zeros((1, length), jnp.int32)
        generate(model, params, ids, max_new_tokens=max_new_tokens, **kwargs)
        return _fill._cache_size()

    for length, new in ((1, 1), (3, 9), (10, SHORTEST_BUCKET - 10)):
        assert compilations_after(length, new, temperature=0.7) == 1
    assert compilations_after(2, 5, temperature=1.3, seed=8) == 1
    for length, new in ((1, SHORTEST_BUCKET), (20, 30), (4, 60)):
        assert compilations_after(length, new, temperature=0.7) == 2
    assert compilations_after(5, 60, temperature=0.7) == 3


@pytest.mark.parametrize("temperature", [1e-30, 1e-50])
def test_a_tiny_temperature_takes_the_likeliest_token(temperature: float) -> None:
    model, params = model_from_checkpoint(random_checkpoint())
    ids = random_ids(TINY, length=4)
    greedy = generate(model, params, ids, max_new_tokens=5)
    assert (generate(model, params, ids, max_new_tokens=5, temperature=temperature) == greedy).all()

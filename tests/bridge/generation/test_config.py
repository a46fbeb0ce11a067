"""`GenerationConfig`: which values are valid, and the random numbers of a seed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.models import TINY

from bridge import BridgeError
from bridge.generation.checks import LARGEST_SEED
from bridge.generation.config import GREEDY_BELOW, GenerationConfig, uniform_noise

PROMPTS = [[5, 1, 256], [2]]
SAMPLED = GenerationConfig(
    4,
    repetition_penalty=1.3,
    temperature=0.8,
    top_k=5,
    top_p=0.9,
    min_p=0.05,
    seed=1,
    num_return_sequences=3,
    eos_token_id=(0, 256),
    logprobs=True,
)
BEAMS = GenerationConfig(4, num_beams=3, num_return_sequences=2, eos_token_id=(256,), length_penalty=0.6)

PINNED = {
    0: [[96861, 2026261, 934707], [6822908, 6302624, 5634200]],
    LARGEST_SEED: [[5095258, 3324360, 3550486], [1380164, 5270161, 4467457]],
}
"""Seed -> the first numbers of two outputs, times 2**23. Texts of a seed stay the same as long as these do."""


@pytest.mark.parametrize(
    "config",
    [
        SAMPLED,
        BEAMS,
        GenerationConfig(0),
        GenerationConfig(TINY.n_positions - 3),
        GenerationConfig(1, temperature=1e-9, seed=LARGEST_SEED),
        GenerationConfig(1, repetition_penalty=0.5, temperature=100.0, top_k=10**6, top_p=1.0, min_p=0.0),
        GenerationConfig(1, temperature=1.0, top_p=1e-9, min_p=1.0),
        GenerationConfig(1, num_beams=TINY.vocab_size),
        GenerationConfig(1, num_beams=TINY.vocab_size - 1, eos_token_id=(7, 7)),  # the same token twice
        GenerationConfig(1, num_beams=2, length_penalty=-1.0),
    ],
)
def test_valid_configurations_pass(config: GenerationConfig) -> None:
    config.check(TINY, PROMPTS)


def test_an_empty_list_of_prompts_is_valid() -> None:
    GenerationConfig(TINY.n_positions).check(TINY, [])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None},
            "num_return_sequences=3: the outputs would be equal without",
        ),
        (
            {"temperature": 0.0, "num_return_sequences": 1, "top_p": None, "min_p": None},
            "top_k=5: has no effect without a temperature",
        ),
        ({"max_new_tokens": -2}, "max_new_tokens=-2: must not be negative"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: must be positive"),
        ({"repetition_penalty": -1.0}, "repetition_penalty=-1.0: must be positive"),
        ({"repetition_penalty": math.inf}, "repetition_penalty=inf: must be .*finite"),
        ({"repetition_penalty": math.nan}, "repetition_penalty=nan"),
        ({"temperature": -1.0}, "temperature=-1.0: must be 0.*or positive"),
        ({"temperature": math.nan}, "temperature=nan: .*finite"),
        ({"temperature": math.inf}, "temperature=inf: .*finite"),
        ({"top_k": -3}, "top_k=-3: must not be negative"),
        ({"top_p": -0.1}, "top_p=-0.1: must be between 0 and 1"),
        ({"top_p": 1.01}, "top_p=1.01: must be between 0 and 1"),
        ({"typical_p": 0.0}, "typical_p=0.0: must be above 0"),
        ({"typical_p": math.nan}, "typical_p=nan: must be between 0 and 1"),
        ({"epsilon_cutoff": 1.5}, "epsilon_cutoff=1.5: must be between 0 and 1"),
        ({"eta_cutoff": -1.0}, "eta_cutoff=-1.0: must be between 0 and 1"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1: must not be negative"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1: must not be negative"),
        ({"suppress_tokens": [3, 257]}, r"suppress_tokens=\[257\]: the vocabulary is 0 to 256"),
        ({"begin_suppress_tokens": [-1]}, r"begin_suppress_tokens=\[-1\]: the vocabulary"),
        ({"suppress_tokens": range(257)}, "suppress_tokens: no token is left"),
        ({"bad_words_ids": [[1, 300]]}, r"bad_words_ids=\[300\]: the vocabulary"),
        ({"bad_words_ids": [[]]}, "bad_words_ids: a sequence is empty"),
        ({"bad_words_ids": [[1] * 2000] * 200}, "bad_words_ids: 200 sequences of up to 2000 tokens are too many"),
        ({"sequence_bias": [((1, 2), math.inf)]}, "sequence_bias: a bias is not finite"),
        ({"sequence_bias": [((1, 999), 2.0)]}, r"sequence_bias=\[999\]: the vocabulary"),
        ({"forced_bos_token_id": 257}, r"forced_bos_token_id=\[257\]: the vocabulary"),
        ({"forced_eos_token_id": (1, 257)}, r"forced_eos_token_id=\[257\]: the vocabulary"),
        ({"forced_eos_token_id": 4, "suppress_tokens": (4,)}, r"forced_eos_token_id=\[4\]: also in suppress_tokens"),
        ({"exponential_decay_length_penalty": (3, math.nan)}, "exponential_decay_length_penalty=.*finite factor"),
        ({"exponential_decay_length_penalty": (3, 1e39)}, "exponential_decay_length_penalty=.*finite factor"),
        ({"early_stopping": "maybe"}, "early_stopping='maybe': must be False, True or 'never'"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"min_p": -0.1}, "min_p=-0.1: must be between 0 and 1"),
        ({"min_p": 1.5}, "min_p=1.5: must be between 0 and 1"),
        ({"min_p": math.nan}, "min_p=nan"),
        ({"seed": -1}, "seed=-1: must be between 0 and 4294967295"),
        ({"seed": LARGEST_SEED + 1}, "seed=4294967296: must be between 0 and 4294967295"),
        ({"num_return_sequences": 0}, "num_return_sequences=0: must be at least 1"),
        ({"eos_token_id": (3, 257, 0, -1)}, r"eos_token_id=\[257, -1\]: the vocabulary is 0 to 256"),
        ({"num_beams": 0}, "num_beams=0: must be at least 1"),
        ({"length_penalty": math.nan}, "length_penalty=nan: must be between -32 and 32"),
        ({"length_penalty": math.inf}, "length_penalty=inf: must be between -32 and 32"),
        ({"length_penalty": -3000.0}, "length_penalty=-3000.0: must be between -32 and 32"),
        ({"num_return_sequences": 1025}, "num_return_sequences=1025: must be at most 1024"),
        ({"temperature": 1e39}, "temperature=1e\\+39: .*finite in float32"),
        ({"repetition_penalty": 1e39}, "repetition_penalty=1e\\+39: .*finite in float32"),
        ({"repetition_penalty": 1e-39}, "repetition_penalty=1e-39: .*finite in float32"),
        ({"sequence_bias": [((1, 2), -1e39)]}, "sequence_bias: a bias is not finite in float32"),
        (
            {"max_new_tokens": 2**24, "slide": True},
            "max_new_tokens=16777216, num_return_sequences=3: their product must be at most 16777216",
        ),
        ({"max_new_tokens": 38}, "41 tokens with the prompt; the model has n_positions=40: use fewer"),
    ],
)
def test_the_error_names_the_invalid_field(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(BridgeError, match=f"^{message}[^;]*$") as caught:
        replace(SAMPLED, **wrong).check(TINY, PROMPTS)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": 0.8}, "temperature=0.8: beam search does not sample; use temperature=0 or num_beams=1"),
        ({"top_k": 5}, "top_k=5: beam search does not sample; leave it out"),
        ({"top_p": 0.9}, "top_p=0.9: beam search does not sample"),
        ({"min_p": 0.1}, "min_p=0.1: beam search does not sample"),
        ({"eta_cutoff": 0.1}, "eta_cutoff=0.1: beam search does not sample"),
        ({"slide": True}, "slide: beam search stays within n_positions"),
        ({"num_return_sequences": 4}, "num_return_sequences=4: must be at most num_beams=3"),
        ({"num_beams": 1025}, "num_beams=1025: must be at most 1024"),
        ({"num_beams": 257}, "num_beams=257: the vocabulary of 257 has fewer tokens besides eos_token_id"),
    ],
)
def test_beam_search_rejects_fields_of_sampling(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(BridgeError, match=f"^{message}"):
        replace(BEAMS, **wrong).check(TINY, PROMPTS)


def test_the_error_names_all_invalid_fields() -> None:
    wrong = GenerationConfig(
        -1,
        repetition_penalty=0.0,
        temperature=-1.0,
        top_k=-1,
        top_p=2.0,
        min_p=-1.0,
        seed=-1,
        num_return_sequences=0,
        eos_token_id=(999,),
        length_penalty=math.nan,
    )
    with pytest.raises(BridgeError) as caught:
        wrong.check(TINY, [[1] * 41, []])
    problems = str(caught.value)
    named = ["max_new_tokens=-1", "repetition_penalty=0.0", "temperature=-1.0", "top_k=-1", "top_p=2.0", "min_p=-1.0"]
    named += [
        "seed=-1",
        "num_return_sequences=0",
        "eos_token_id=[999]",
        "length_penalty=nan",
        "the prompt is empty",
        "41 tokens",
    ]
    assert [name for name in named if problems.count(name) != 1] == []


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        (None, ()),
        (5, (5,)),
        (0, (0,)),
        ((5, 7), (5, 7)),
        ([5, 7], (5, 7)),
        (np.int64(5), (5,)),
        (np.array([5, 7]), (5, 7)),
    ],
)
def test_end_of_sequence_tokens_are_a_tuple_however_they_are_given(given: Any, ids: tuple[int, ...]) -> None:
    assert GenerationConfig(1, eos_token_id=given).eos_token_ids == ids


def test_overrides_replace_fields_of_a_configuration() -> None:
    assert GenerationConfig.of(None, {"max_new_tokens": 3, "top_k": 2}) == GenerationConfig(3, top_k=2)
    assert GenerationConfig.of(SAMPLED, {"top_k": 2}) == replace(SAMPLED, top_k=2)
    assert GenerationConfig.of(SAMPLED, {}) == SAMPLED
    with pytest.raises(TypeError, match="max_new_tokens"):
        GenerationConfig.of(None, {"top_k": 2})
    with pytest.raises(TypeError, match="top_n"):
        GenerationConfig.of(SAMPLED, {"top_n": 2})


@pytest.mark.parametrize("prompts", [[[]], [[1, 2], []]])
@pytest.mark.parametrize("slide", [False, True])
def test_an_empty_prompt_is_refused(prompts: list[list[int]], slide: bool) -> None:
    with pytest.raises(BridgeError, match="the prompt is empty; give at least one token"):
        GenerationConfig(1, slide=slide).check(TINY, prompts)


@pytest.mark.parametrize(
    ("prompts", "new"), [([[1] * 40], 1), ([[1], [1] * 30], 11), ([[1] * 41], 0), ([[1] * 99], 99)]
)
def test_more_than_the_positions_needs_sliding(prompts: list[list[int]], new: int) -> None:
    with pytest.raises(BridgeError, match=f"^{len(prompts[-1]) + new} tokens with the prompt; .* or slide$"):
        GenerationConfig(new).check(TINY, prompts)
    GenerationConfig(new, slide=True).check(TINY, prompts)


@pytest.mark.parametrize(
    ("temperature", "greedy"), [(0.0, True), (GREEDY_BELOW / 2, True), (GREEDY_BELOW, False), (1.0, False)]
)
def test_a_temperature_close_to_zero_is_greedy(temperature: float, greedy: bool) -> None:
    assert GenerationConfig(1, temperature=temperature).greedy is greedy


# The random numbers


def test_there_is_a_float32_number_below_one_for_each_token_of_each_output() -> None:
    noise = uniform_noise(GenerationConfig(5000, num_return_sequences=7))
    assert noise.shape == (7, 5000) and noise.dtype == np.float32
    assert 0 <= noise.min() < 0.001 and 0.999 < noise.max() < 1
    steps = noise.astype(np.float64) * 2**23
    assert (steps == steps.round()).all()
    assert uniform_noise(GenerationConfig(0, num_return_sequences=2)).shape == (2, 0)


def test_the_numbers_are_uniform() -> None:
    counts = np.histogram(
        uniform_noise(GenerationConfig(20_000, num_return_sequences=5, seed=3)), bins=100, range=(0, 1)
    )[0]
    assert np.abs(counts - 1000).max() < 5 * math.sqrt(1000)  # five standard deviations


def test_the_numbers_depend_on_the_seed_and_the_output_only() -> None:
    config = GenerationConfig(50, num_return_sequences=3, seed=8)
    noise = uniform_noise(config)
    np.testing.assert_array_equal(noise, uniform_noise(replace(config, temperature=2.0, top_k=3)))
    rows = [*noise, *uniform_noise(replace(config, seed=9)), *uniform_noise(replace(config, seed=0))]
    assert len(np.unique(rows)) > 0.99 * 9 * 50  # no row repeats another, whole or shifted


@pytest.mark.parametrize(
    "more", [{"num_return_sequences": 5}, {"max_new_tokens": 60}, {"num_return_sequences": 4, "max_new_tokens": 51}]
)
def test_more_outputs_or_tokens_keep_the_first_numbers(more: dict[str, int]) -> None:
    config = GenerationConfig(50, num_return_sequences=3, seed=8)
    np.testing.assert_array_equal(uniform_noise(replace(config, **more))[:3, :50], uniform_noise(config))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", PINNED)
def test_the_numbers_of_a_seed_never_change(seed: int) -> None:
    noise = uniform_noise(GenerationConfig(3, num_return_sequences=2, seed=seed))
    np.testing.assert_array_equal(noise, np.array(PINNED[seed], np.float32) * np.float32(2.0**-23))

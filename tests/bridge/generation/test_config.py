"""What may be asked of a decoder, and what a seed means."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.models import TINY

from bridge import BridgeError
from bridge.generation.config import GREEDY_BELOW, LARGEST_SEED, GenerationConfig, uniform_draws

PROMPTS = [[5, 1, 256], [2]]
SAMPLED = GenerationConfig(4, 1.3, 0.8, 5, 0.9, 0.05, seed=1, samples=3, stop_ids=(0, 256), log_probs=True)
BEAMS = GenerationConfig(4, beams=3, samples=2, stop_ids=(256,), length_penalty=0.6)

PINNED = {
    0: [[96861, 2026261, 934707], [6822908, 6302624, 5634200]],
    LARGEST_SEED: [[5095258, 3324360, 3550486], [1380164, 5270161, 4467457]],
}
"""Each seed's first draws of two samples, times 2**23. While they stay, so do the texts that were made with a seed."""


@pytest.mark.parametrize(
    "request_",
    [
        SAMPLED,
        BEAMS,
        GenerationConfig(0),
        GenerationConfig(TINY.n_positions - 3),
        GenerationConfig(1, temperature=1e-9, seed=LARGEST_SEED),
        GenerationConfig(1, repetition_penalty=0.5, temperature=100.0, top_k=10**6, top_p=1.0, min_p=0.0),
        GenerationConfig(1, temperature=1.0, top_p=1e-9, min_p=1.0),
        GenerationConfig(1, beams=TINY.vocab_size),
        GenerationConfig(1, beams=TINY.vocab_size - 1, stop_ids=(7, 7)),  # one token, though given twice
        GenerationConfig(1, beams=2, length_penalty=-1.0),
    ],
)
def test_sensible_requests_pass(request_: GenerationConfig) -> None:
    request_.check(TINY, PROMPTS)


def test_no_prompts_are_no_problem() -> None:
    GenerationConfig(TINY.n_positions).check(TINY, [])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None}, "samples=3: would all be the same without"),
        (
            {"temperature": 0.0, "samples": 1, "top_p": None, "min_p": None},
            "top_k=5: does nothing without a temperature",
        ),
        ({"max_new_tokens": -2}, "max_new_tokens=-2: must not be negative"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: must be positive"),
        ({"repetition_penalty": -1.0}, "repetition_penalty=-1.0: must be positive"),
        ({"repetition_penalty": math.inf}, "repetition_penalty=inf: must be .*finite"),
        ({"repetition_penalty": math.nan}, "repetition_penalty=nan"),
        ({"temperature": -1.0}, "temperature=-1.0: must be 0.*or positive"),
        ({"temperature": math.nan}, "temperature=nan: .*finite"),
        ({"temperature": math.inf}, "temperature=inf: .*finite"),
        ({"top_k": 0}, "top_k=0: must be at least 1"),
        ({"top_k": -3}, "top_k=-3: must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0"),
        ({"top_p": 1.01}, "top_p=1.01: must be .*at most 1"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"min_p": -0.1}, "min_p=-0.1: must be between 0 and 1"),
        ({"min_p": 1.5}, "min_p=1.5: must be between 0 and 1"),
        ({"min_p": math.nan}, "min_p=nan"),
        ({"seed": -1}, "seed=-1: must be between 0 and 4294967295"),
        ({"seed": LARGEST_SEED + 1}, "seed=4294967296: must be between 0 and 4294967295"),
        ({"samples": 0}, "samples=0: must be at least 1"),
        ({"stop_ids": (3, 257, 0, -1)}, r"stop_ids=\[257, -1\]: the vocabulary is 0 to 256"),
        ({"beams": 0}, "beams=0: must be at least 1"),
        ({"length_penalty": math.nan}, "length_penalty=nan: must be finite"),
        ({"length_penalty": math.inf}, "length_penalty=inf: must be finite"),
        ({"max_new_tokens": 38}, "41 tokens with the prompt; the model has n_positions=40: ask for fewer"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(BridgeError, match=f"^{says}[^;]*$") as caught:
        replace(SAMPLED, **wrong).check(TINY, PROMPTS)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"temperature": 0.8}, "temperature=0.8: beams are not sampled; leave it 0, or beams 1"),
        ({"repetition_penalty": 1.3}, "repetition_penalty=1.3: beams are ranked by the model's own probabilities"),
        ({"top_k": 5}, "top_k=5: beams are ranked"),
        ({"top_p": 0.9}, "top_p=0.9: beams are ranked"),
        ({"min_p": 0.1}, "min_p=0.1: beams are ranked"),
        ({"slide": True}, "slide: beams are kept within n_positions"),
        ({"samples": 4}, "samples=4: no more than beams=3"),
        ({"beams": 257}, "beams=257: more than the vocabulary of 257 has besides stop_ids"),
    ],
)
def test_beams_exclude_what_only_sampling_honours(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(BridgeError, match=f"^{says}"):
        replace(BEAMS, **wrong).check(TINY, PROMPTS)


def test_all_problems_are_told_at_once() -> None:
    wrong = GenerationConfig(-1, 0.0, -1.0, 0, 2.0, -1.0, seed=-1, samples=0, stop_ids=(999,), length_penalty=math.nan)
    with pytest.raises(BridgeError) as caught:
        wrong.check(TINY, [[1] * 41, []])
    problems = str(caught.value)
    named = ["max_new_tokens=-1", "repetition_penalty=0.0", "temperature=-1.0", "top_k=0", "top_p=2.0", "min_p=-1.0"]
    named += ["seed=-1", "samples=0", "stop_ids=[999]", "length_penalty=nan", "the prompt is empty", "41 tokens"]
    assert [name for name in named if problems.count(name) != 1] == []


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
def test_a_temperature_of_next_to_nothing_is_greedy(temperature: float, greedy: bool) -> None:
    assert GenerationConfig(1, temperature=temperature).greedy is greedy


# Draws


def test_draws_are_float32_below_one_a_number_for_each_token_of_each_sample() -> None:
    draws = uniform_draws(GenerationConfig(5000, samples=7))
    assert draws.shape == (7, 5000) and draws.dtype == np.float32
    assert 0 <= draws.min() < 0.001 and 0.999 < draws.max() < 1
    steps = draws.astype(np.float64) * 2**23
    assert (steps == steps.round()).all()
    assert uniform_draws(GenerationConfig(0, samples=2)).shape == (2, 0)


def test_draws_are_uniform() -> None:
    counts = np.histogram(uniform_draws(GenerationConfig(20_000, samples=5, seed=3)), bins=100, range=(0, 1))[0]
    assert np.abs(counts - 1000).max() < 5 * math.sqrt(1000)  # five standard deviations


def test_the_seed_and_the_sample_decide_the_draws() -> None:
    request = GenerationConfig(50, samples=3, seed=8)
    draws = uniform_draws(request)
    np.testing.assert_array_equal(draws, uniform_draws(replace(request, temperature=2.0, top_k=3)))
    rows = [*draws, *uniform_draws(replace(request, seed=9)), *uniform_draws(replace(request, seed=0))]
    assert len(np.unique(rows)) > 0.99 * 9 * 50  # no row repeats another's, whole or moved along


@pytest.mark.parametrize("more", [{"samples": 5}, {"max_new_tokens": 60}, {"samples": 4, "max_new_tokens": 51}])
def test_asking_for_more_leaves_the_first_draws_as_they_are(more: dict[str, int]) -> None:
    request = GenerationConfig(50, samples=3, seed=8)
    np.testing.assert_array_equal(uniform_draws(replace(request, **more))[:3, :50], uniform_draws(request))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", PINNED)
def test_a_seed_means_the_same_for_ever(seed: int) -> None:
    draws = uniform_draws(GenerationConfig(3, samples=2, seed=seed))
    np.testing.assert_array_equal(draws, np.array(PINNED[seed], np.float32) * np.float32(2.0**-23))

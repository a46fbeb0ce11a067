"""Logits processors and sampling: both backends against transformers' processors, and against exact probabilities.

If a sum of probabilities equals a threshold up to float32 rounding, either result is correct. Such tokens and noise are
found in float64 and excluded. Everything else must be equal.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import gpt2_jax.logits_processors
import gpt2_torch.logits_processors
from bridge import GenerationConfig
from bridge.generation.config import uniform_noise

EPSILON = 2.0**-23

SUM = 8 * EPSILON
"""Error of a sum of probabilities in float32. The sum of 50257 of them is wrong by one unit."""

CUMULATIVE = 20 * EPSILON
"""Error of a cumulative probability over a few hundred tokens, and of the noise, a multiple of `EPSILON`."""

UNITS = 4 * EPSILON
"""Relative error of a few float32 operations."""

LEAST_P_VALUE = 1e-4
"""The limit of a chi-square test. The noise is fixed, so the result is always the same."""

LEAST_COUNT = 5
"""Tokens with a lower expected count are grouped, which the chi-square distribution requires."""

DRAWS = 100_000

SampleToken = Callable[[np.ndarray, np.ndarray, GenerationConfig, np.ndarray | None], np.ndarray]
"""(logits, noise, config, seen) -> tokens."""

Filter = Callable[[np.ndarray, Any], np.ndarray]
"""(logits, value of the processor) -> processed logits."""

jit_sample_token = jax.jit(gpt2_jax.logits_processors.sample_token)


def torch_sample_token(
    logits: np.ndarray, noise: np.ndarray, config: GenerationConfig, seen: np.ndarray | None = None
) -> np.ndarray:
    mask = None if seen is None else torch.from_numpy(seen)
    return gpt2_torch.logits_processors.sample_token(
        torch.tensor(logits), torch.from_numpy(noise), config, mask
    ).numpy()


def jax_sample_token(
    logits: np.ndarray, noise: np.ndarray, config: GenerationConfig, seen: np.ndarray | None = None
) -> np.ndarray:
    mask = None if seen is None else jnp.asarray(seen)
    return np.asarray(
        jit_sample_token(
            jnp.asarray(logits), jnp.asarray(noise), gpt2_jax.logits_processors.LogitsProcessors.of(config), mask
        )
    )


def torch_filter(function: Callable[..., torch.Tensor]) -> Filter:
    return lambda logits, value: function(torch.tensor(logits), value).numpy()


def jax_filter(function: Callable[..., jax.Array], dtype: type = np.float32) -> Filter:
    jitted = jax.jit(function)
    return lambda logits, value: np.asarray(jitted(jnp.asarray(logits), jnp.asarray(value, dtype)))


FILTERS: Mapping[str, Mapping[str, Filter]] = {
    "torch": {
        "top_k": torch_filter(gpt2_torch.logits_processors.keep_top_k),
        "top_p": torch_filter(gpt2_torch.logits_processors.keep_top_p),
        "min_p": torch_filter(gpt2_torch.logits_processors.keep_min_p),
    },
    "jax": {
        "top_k": jax_filter(gpt2_jax.logits_processors.keep_top_k, np.int32),
        "top_p": jax_filter(gpt2_jax.logits_processors.keep_top_p),
        "min_p": jax_filter(gpt2_jax.logits_processors.keep_min_p),
    },
}
PEERS: Mapping[str, Callable[[Any], Any]] = {  # in the order in which transformers applies them
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}

each_backend = pytest.mark.parametrize("backend", FILTERS)
each_sample_token = pytest.mark.parametrize(
    "sample_token", [torch_sample_token, jax_sample_token], ids=["torch", "jax"]
)
each_value = pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("top_k", k) for k in (1, 2, 40, 256, 257, 10**6)),
        *(("top_p", p) for p in (1e-9, 0.05, 0.5, 0.9, 0.99)),
        *(("min_p", p) for p in (0.0, 1e-3, 0.05, 0.5, 1.0)),
    ],
)


@functools.cache
def distinct_rows(V: int, seed: int = 0) -> np.ndarray:
    """Return rows with many distributions and no ties, of which transformers may keep only some tokens."""
    rng = np.random.default_rng(seed)
    u, v, w, x, y, z = ((rng.permutation(V) + 0.5) / V for _ in range(6))
    logistic = [np.log(q / (1 - q)) for q in (u, v, w, x)]
    logistic[3][V // 3] += 30
    rows = [
        0.3 * logistic[0],
        2 * logistic[1],
        1.5 * logistic[2] - 100,  # like the logits of GPT-2
        logistic[3],  # one outlier
        10 * y,
        y + 8 * (y > 0.7),  # two groups
        np.tan(np.pi * (z - 0.5)),  # heavy tails
        np.sort(logistic[0]),
        -np.sort(-logistic[1]),
    ]
    found = np.stack(rows).astype(np.float32)
    assert all(len(np.unique(row)) == V for row in found)
    found.flags.writeable = False
    return found


def rows_with_ties(V: int) -> np.ndarray:
    """Return rows with ties, and with the largest and smallest float32 numbers."""
    rng = np.random.default_rng(1)
    coarse = np.round(2 * rng.normal(size=V)) / 2 + 0.25
    rows = [
        coarse,
        coarse - 110,
        np.round(rng.normal(size=V)) + 0.0,
        np.full(V, -7.25),
        np.where(np.arange(V) < V // 2, 1.0, 0.0),
        np.where(np.arange(V) == V - 1, 3.0, 2.0),
        1e30 * coarse,
        1e-30 * coarse,
        3e38 * np.sign(coarse),
        np.where(rng.random(V) < 0.7, -np.inf, coarse),  # -inf from another processor
    ]
    return np.stack(rows).astype(np.float32)


def peer(name: str, value: float, logits: np.ndarray, ids: np.ndarray | None = None) -> np.ndarray:
    tokens: Any = None if ids is None else torch.from_numpy(ids)
    return PEERS[name](value)(tokens, torch.tensor(logits)).numpy()


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the softmax in float64."""
    exact = logits.astype(np.float64)
    weights = np.exp(exact - exact.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def by_definition(name: str, value: float, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which tokens a processor keeps, including ties, and for which of them float32 rounding decides."""
    if name == "top_k":
        k_th = -np.sort(-logits, axis=-1)[:, min(int(value), logits.shape[-1]) - 1 : int(value)]
        return logits >= k_th[:, :1], np.zeros(logits.shape, bool)
    if name == "top_p":
        likelier = np.stack([likelier_than(*row) for row in zip(logits, probabilities(logits), strict=True)])
        return likelier < value, np.abs(likelier - value) < SUM * (likelier > 0)
    if not value:
        return np.ones(logits.shape, bool), np.zeros(logits.shape, bool)
    exact, highest = logits.astype(np.float64), logits.max(-1, keepdims=True).astype(np.float64)
    margin = exact - highest - math.log(value)
    return margin >= 0, np.abs(margin) < UNITS * (np.abs(highest) + 1) * (exact < highest)


def likelier_than(logits: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Return, for each token, the total probability of the more likely tokens."""
    values, of_token = np.unique(-logits, return_inverse=True)
    of_value = np.bincount(of_token, weights=p, minlength=len(values))
    return (np.cumsum(of_value) - of_value)[of_token]


def assert_keeps(found: np.ndarray, logits: np.ndarray, kept: np.ndarray, undecided: np.ndarray) -> None:
    """Check that `found` has the logits of these tokens, and minus infinity for the others."""
    assert found.dtype == np.float32
    unchanged = found == logits
    assert (unchanged | (found == -np.inf)).all()
    forbidden = logits == -np.inf
    wrong = (unchanged != kept) & ~undecided & ~forbidden
    assert not wrong.any(), f"{wrong.sum(-1)} tokens of each row"


# Single processors


@each_backend
@each_value
@pytest.mark.parametrize("V", [7, 257, 50257])
def test_a_processor_keeps_what_transformers_keeps(backend: str, name: str, value: float, V: int) -> None:
    logits = distinct_rows(V)
    kept, undecided = by_definition(name, value, logits)
    theirs = peer(name, value, logits)
    assert_keeps(theirs, logits, kept, undecided)
    assert_keeps(FILTERS[backend][name](logits, value), logits, theirs > -np.inf, undecided)
    assert kept.any(-1).all() and undecided.mean() < 0.01


@each_value
@pytest.mark.parametrize("V", [7, 257])
def test_both_backends_keep_ties(name: str, value: float, V: int) -> None:
    logits = rows_with_ties(V)
    kept, undecided = by_definition(name, value, logits)
    for backend in FILTERS:
        found = FILTERS[backend][name](logits, value)
        assert_keeps(found, logits, kept, undecided)
        assert (found.max(-1) == logits.max(-1)).all()


@each_backend
@pytest.mark.parametrize(("name", "value"), [("top_p", 1.0), ("min_p", 0.0), ("top_k", 50257)])
def test_a_processor_with_its_neutral_value_keeps_everything(backend: str, name: str, value: float) -> None:
    logits = distinct_rows(50257)
    np.testing.assert_array_equal(FILTERS[backend][name](logits, value), logits)


@each_backend
@pytest.mark.parametrize(("name", "value"), [("top_p", 0.1), ("min_p", 1.0), ("top_k", 1)])
def test_zeros_of_both_signs_are_tied(backend: str, name: str, value: float) -> None:
    logits = np.array([[-1.0, 0.0, -0.0, -2.0, -0.0]], np.float32)
    assert (FILTERS[backend][name](logits, value) > -np.inf).tolist() == [[False, True, True, False, True]]


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 7.0])
@pytest.mark.parametrize("V", [7, 257, 50257])
def test_repetition_is_penalized_as_in_transformers(penalty: float, V: int) -> None:
    logits = distinct_rows(V).copy()
    logits[:, 2] = 0.0
    ids = np.random.default_rng(2).integers(0, V, (len(logits), 40))  # some of them repeated
    ids[:, :2] = 2, V - 1
    expected, seen = peer("repetition_penalty", penalty, logits, ids), seen_of(ids, V)
    ours = gpt2_torch.logits_processors.penalize_repetition(
        torch.from_numpy(logits), torch.from_numpy(seen), penalty
    ).numpy()
    theirs = np.asarray(jax.jit(gpt2_jax.logits_processors.penalize_repetition)(logits, seen, jnp.float32(penalty)))
    for found in (ours, theirs):
        np.testing.assert_array_equal(found[~seen], logits[~seen])
        np.testing.assert_allclose(found, expected, rtol=UNITS, atol=0)


def seen_of(ids: np.ndarray, V: int) -> np.ndarray:
    seen = np.zeros((len(ids), V), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    return seen


# All processors, and sampling


VALUES: Mapping[str, tuple[float, ...]] = {
    "repetition_penalty": (1.3, 0.6),
    "temperature": (0.7, 1.9),
    "top_k": (30, 3),
    "top_p": (0.9, 0.4),
    "min_p": (0.02, 0.3),
}
COMBINATIONS = [
    names for n in range(5) for names in itertools.combinations(("repetition_penalty", "top_k", "top_p", "min_p"), n)
]
V, COPIES = 300, 40  # two blocks of tokens in `gpt2_jax`; rows of each distribution


@pytest.mark.parametrize("names", COMBINATIONS, ids=lambda names: "+".join(names) or "none")
def test_both_backends_sample_by_inverting_the_cumulative_probability(names: tuple[str, ...]) -> None:
    """So both backends select the same token for the same noise."""
    logits = np.concatenate([distinct_rows(V, seed) for seed in range(COPIES)])
    ids = np.random.default_rng(3).integers(0, V, (len(logits), 30))
    noise = uniform_noise(GenerationConfig(len(logits), seed=4))[0]
    noise[::50], noise[1::50] = 0, 1 - EPSILON
    for turn in range(2):
        values = {name: VALUES[name][turn] for name in PEERS if name in (*names, "temperature")}
        filtered, undecided = filtered_by_transformers(values, logits, ids)
        wanted, near = inverse_cumulative(filtered, noise)
        assert (near | undecided).mean() < 0.1
        for sample_token in (torch_sample_token, jax_sample_token):
            found = sample_token(logits, noise, GenerationConfig(1, **values), seen_of(ids, V))  # type: ignore[arg-type]
            np.testing.assert_array_equal(found[~(near | undecided)], wanted[~(near | undecided)])
            assert (filtered[np.arange(len(found)), found] > -np.inf)[~undecided].all()


def filtered_by_transformers(
    values: Mapping[str, float], logits: np.ndarray, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits after all processors, and which rows have a token at a threshold."""
    undecided = np.zeros(len(logits), bool)
    for name, value in values.items():  # in the order of `PEERS`
        if name in ("top_p", "min_p"):
            undecided |= (by_definition(name, value, logits)[1] & (logits > -np.inf)).any(-1)
        logits = peer(name, value, logits, ids)
    return logits, undecided


def inverse_cumulative(logits: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the token for each noise, and whether the noise is at the border of two tokens."""
    upto = probabilities(logits).cumsum(-1)
    wanted = (upto <= noise[:, None] * upto[:, -1:]).sum(-1)
    ends = np.where((upto > 0) & (upto < upto[:, -1:]), upto, np.inf)
    return wanted, np.abs(ends - noise[:, None]).min(-1) < CUMULATIVE


@each_sample_token
@pytest.mark.parametrize("V", [7, 257, 700, 50257])
def test_rounding_never_samples_a_removed_token(sample_token: SampleToken, V: int) -> None:
    """Noise at all borders between tokens."""
    rng = np.random.default_rng(V)
    for share in (0.5, 0.9):
        logits = np.where(rng.random(V) < share * min(1, 300 / V), 2 * rng.normal(size=V), -np.inf).astype(np.float32)
        logits[256:512] = -np.inf  # a whole block of `gpt2_jax`
        logits[V // 2] = 1.0
        p = probabilities(logits)
        steps = np.round(np.unique(p.cumsum()) / EPSILON)[:, None] + np.arange(-2, 3)
        noise = np.unique(steps.clip(0, 1 / EPSILON - 1)).astype(np.float32) * np.float32(EPSILON)
        noise = noise[:: 1 + len(noise) // 200]
        found = sample_token(np.tile(logits, (len(noise), 1)), noise, GenerationConfig(1, temperature=1.0), None)
        assert (p[found] > 0).all()
        upto = p.cumsum()[found]
        assert (noise < upto + CUMULATIVE).all() and (noise > upto - p[found] - CUMULATIVE).all()


@each_sample_token
@pytest.mark.parametrize("penalty", [None, 0.5, 2.0])
def test_greedy_takes_the_most_likely_token(sample_token: SampleToken, penalty: float | None) -> None:
    logits = distinct_rows(257)
    ids = np.argsort(-logits)[:, [0, 1, 5]]
    expected = logits if penalty is None else peer("repetition_penalty", penalty, logits, ids)
    noise = np.full(len(logits), 0.7, np.float32)
    for temperature in (0.0, 1e-9):
        config = GenerationConfig(1, penalty, temperature, top_k=40, top_p=0.5, min_p=0.5)
        found = sample_token(logits, noise, config, seen_of(ids, 257))
        np.testing.assert_array_equal(found, expected.argmax(-1))
        assert np.issubdtype(found.dtype, np.integer)


@each_sample_token
@pytest.mark.parametrize(
    "fields", [{}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"top_k": 3, "top_p": 0.2, "min_p": 0.7}]
)
def test_tied_tokens_are_all_sampled(sample_token: SampleToken, fields: dict[str, Any]) -> None:
    noise = (np.arange(257, dtype=np.float32) + 0.5) / 257
    for level in (0.0, -33.3, 1e30):
        logits = np.full((257, 257), level, np.float32)
        found = sample_token(logits, noise, GenerationConfig(1, temperature=0.7, **fields), None)
        np.testing.assert_array_equal(found, np.arange(257))
        assert (sample_token(logits, noise, GenerationConfig(1, **fields), None) == 0).all()


# Frequencies


NUMPYS = np.random.default_rng(6).random(DRAWS, np.float32)
OURS = uniform_noise(GenerationConfig(DRAWS // 250, num_return_sequences=250, seed=7)).ravel()
EVERY_FILTER = {"repetition_penalty": 1.2, "temperature": 1.3, "top_k": 40, "top_p": 0.95, "min_p": 0.02}


@each_sample_token
@pytest.mark.parametrize(
    ("values", "noise"),
    [
        ({"temperature": 1.0}, NUMPYS),
        ({"temperature": 0.6}, NUMPYS),
        ({"temperature": 2.5}, OURS),
        ({"temperature": 1.0, "top_k": 9}, NUMPYS),
        ({"temperature": 1.0, "top_p": 0.8}, NUMPYS),
        ({"temperature": 1.0, "min_p": 0.1}, NUMPYS),
        ({"repetition_penalty": 1.8, "temperature": 1.0}, NUMPYS),
        (EVERY_FILTER, NUMPYS),
        (EVERY_FILTER, OURS),
    ],
    ids=lambda x: ",".join(f"{name}={value}" for name, value in x.items()) if isinstance(x, dict) else "",
)
def test_tokens_are_sampled_with_their_probabilities(
    sample_token: SampleToken, values: dict[str, Any], noise: np.ndarray
) -> None:
    logits = np.random.default_rng(5).normal(scale=1.5, size=(1, 64)).astype(np.float32)
    ids = np.argsort(-logits)[:, ::3]  # the most likely token, and others
    filtered, undecided = filtered_by_transformers(values, logits, ids)
    assert not undecided.any()
    p = probabilities(filtered)[0]
    found = sample_token(
        np.tile(logits, (DRAWS, 1)), noise, GenerationConfig(1, **values), np.tile(seen_of(ids, 64), (DRAWS, 1))
    )
    counts = np.bincount(found, minlength=64)
    assert counts[p == 0].sum() == 0
    assert chi_square_p_value(counts, DRAWS * p) > LEAST_P_VALUE


def chi_square_p_value(counts: np.ndarray, expected: np.ndarray) -> float:
    rare = expected < LEAST_COUNT
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    halves = torch.tensor([(len(counts) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(*halves).item()


def test_the_chi_square_test_detects_a_small_bias() -> None:
    """Every seventh time, one of twenty tokens is sampled instead of another."""
    p = np.linspace(1, 3, 20) / 40
    biased = p.copy()
    biased[3], biased[4] = 0.85 * p[3], p[4] + 0.15 * p[3]
    assert chi_square_p_value(np.round(DRAWS * p), DRAWS * p) > 0.99
    assert chi_square_p_value(np.round(DRAWS * biased), DRAWS * p) < LEAST_P_VALUE
    # From tables of the distribution: 5 % of it are above 30.144 with 19 degrees of freedom.
    shifted = DRAWS * p
    shifted[0] += (shift := math.sqrt(30.144 / (1 / shifted[0] + 1 / shifted[1])))
    shifted[1] -= shift
    assert abs(chi_square_p_value(shifted, DRAWS * p) - 0.05) < 1e-4

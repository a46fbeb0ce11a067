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
import transformers
from support.implementations import transformers_model
from support.models import TINY, random_checkpoint
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

import gpt2_jax.logits_processors
import gpt2_jax.sampling
import gpt2_torch.logits_processors
import gpt2_torch.sampling
from bridge import GenerationConfig
from bridge.generation.config import NEUTRAL, uniform_noise
from bridge.generation.processors import MOST_FAVOUR, LogitsProcessors, padded_ids, seen_tokens

pytestmark = pytest.mark.usefixtures("optimized_compilation")  # of sums and sorts over 50257 tokens

EPSILON = 2.0**-23

SUM = 8 * EPSILON
"""Error of a sum of probabilities in float32. The sum of 50257 of them is wrong by one unit."""

CUMULATIVE = 20 * EPSILON
"""Error of a cumulative probability over a few hundred tokens, and of the noise, a multiple of `EPSILON`."""

UNITS = 4 * EPSILON
"""Relative error of a few float32 operations."""

TORCH_SUM = 2 * math.sqrt(50257) * EPSILON
"""Error of transformers' cumulative sum of 50257 probabilities in float32, relative to the total.

Two sums have this many terms: that of the softmax, and the cumulative one. The error of each grows with the square root
of the number of terms, and depends on the vector instructions of the CPU.
"""

INFORMATION = 64 * EPSILON
"""Error of a log-probability relative to the largest logit, which the sum over the vocabulary dominates."""

LEAST_P_VALUE = 1e-4
"""The limit of a chi-square test. The noise is fixed, so the result is always the same."""

LEAST_COUNT = 5
"""Tokens with a lower expected count are grouped, which the chi-square distribution requires."""

DRAWS = 100_000

SampleToken = Callable[[np.ndarray, np.ndarray, GenerationConfig, np.ndarray | None], np.ndarray]
"""(logits, noise, config, seen) -> tokens."""

Filter = Callable[[np.ndarray, Any], np.ndarray]
"""(logits, value of the processor) -> processed logits."""


@jax.jit
def jit_sample_token(logits: jax.Array, noise: jax.Array, processors: LogitsProcessors, seen: Any) -> jax.Array:
    history = gpt2_jax.logits_processors.History(None, seen, jnp.int32(0), jnp.int32(0))
    processed = gpt2_jax.logits_processors.process_logits(logits, processors, history)
    return gpt2_jax.sampling.select_token(processed, noise, processors)


def torch_sample_token(
    logits: np.ndarray, noise: np.ndarray, config: GenerationConfig, seen: np.ndarray | None = None
) -> np.ndarray:
    processors = gpt2_torch.logits_processors.on_device(config, logits.shape[1], torch.device("cpu"))
    history = gpt2_torch.logits_processors.History(None, None if seen is None else torch.from_numpy(seen), 0)
    processed = gpt2_torch.logits_processors.process_logits(torch.tensor(logits), processors, history)
    return gpt2_torch.sampling.select_token(processed, torch.from_numpy(noise), processors).numpy()


def jax_sample_token(
    logits: np.ndarray, noise: np.ndarray, config: GenerationConfig, seen: np.ndarray | None = None
) -> np.ndarray:
    processors = gpt2_jax.logits_processors.on_device(config, logits.shape[1])
    return np.asarray(jit_sample_token(jnp.asarray(logits), jnp.asarray(noise), processors, seen))


def torch_filter(function: Callable[..., torch.Tensor]) -> Filter:
    return lambda logits, value: function(torch.tensor(logits), value).numpy()


def jax_filter(function: Callable[..., jax.Array], dtype: type = np.float32) -> Filter:
    jitted = jax.jit(function)
    return lambda logits, value: np.asarray(jitted(jnp.asarray(logits), jnp.asarray(value, dtype)))


FILTERS: Mapping[str, Mapping[str, Filter]] = {
    "torch": {
        "top_k": torch_filter(gpt2_torch.sampling.keep_top_k),
        "top_p": torch_filter(gpt2_torch.sampling.keep_top_p),
        "min_p": torch_filter(gpt2_torch.sampling.keep_min_p),
        "typical_p": torch_filter(gpt2_torch.sampling.keep_typical),
        "epsilon_cutoff": torch_filter(gpt2_torch.sampling.keep_epsilon),
        "eta_cutoff": torch_filter(gpt2_torch.sampling.keep_eta),
    },
    "jax": {
        "top_k": jax_filter(gpt2_jax.sampling.keep_top_k, np.int32),
        "top_p": jax_filter(gpt2_jax.sampling.keep_top_p),
        "min_p": jax_filter(gpt2_jax.sampling.keep_min_p),
        "typical_p": jax_filter(gpt2_jax.sampling.keep_typical),
        "epsilon_cutoff": jax_filter(gpt2_jax.sampling.keep_epsilon),
        "eta_cutoff": jax_filter(gpt2_jax.sampling.keep_eta),
    },
}
PEERS: Mapping[str, Callable[[Any], Any]] = {  # in the order in which transformers applies them
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}

TRUNCATION_PEERS: Mapping[str, Callable[[Any], Any]] = {
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
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


@pytest.mark.sampled(3)
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


@pytest.mark.sampled(5)
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


@pytest.mark.sampled(3)
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
        config = GenerationConfig(
            1, repetition_penalty=penalty, temperature=temperature, top_k=40, top_p=0.5, min_p=0.5
        )
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


@pytest.mark.sampled(5)
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


# Processors that depend on the tokens so far


PROMPT_LENGTH, STEPS = 4, 9
EOS = (5, 250)
SEQUENCES = [((7,), 2.5), ((3, 4), -1.5), ((1, 2, 3), 4.0), ((9, 3, 4), 0.5), ((8, 8, 8, 8, 8, 8), 9.0)]
BAD_WORDS = [[2], [5], [3, 4], [1, 2, 3], [6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6]]

HISTORY_PEERS: Mapping[str, tuple[dict[str, Any], Callable[[int], Any]]] = {
    "sequence_bias": (
        {"sequence_bias": SEQUENCES},
        lambda _: SequenceBiasLogitsProcessor([[[*ids], bias] for ids, bias in SEQUENCES]),
    ),
    **{
        f"no_repeat_ngram_size {n}": ({"no_repeat_ngram_size": n}, lambda _, n=n: NoRepeatNGramLogitsProcessor(n))
        for n in (1, 2, 3, 4, 20)
    },
    "bad_words_ids": (
        {"bad_words_ids": BAD_WORDS, "eos_token_id": EOS},
        lambda _: NoBadWordsLogitsProcessor(BAD_WORDS, [*EOS]),
    ),
    "min_new_tokens": (
        {"min_new_tokens": 3, "eos_token_id": EOS},
        lambda prompt: MinNewTokensLengthLogitsProcessor(prompt, 3, [*EOS]),
    ),
    "forced_bos_token_id": ({"forced_bos_token_id": 11}, lambda _: ForcedBOSTokenLogitsProcessor(11)),
    "forced_eos_token_id": (
        {"forced_eos_token_id": EOS},
        lambda prompt: ForcedEOSTokenLogitsProcessor(prompt + STEPS, [*EOS]),
    ),
    "exponential_decay_length_penalty": (
        {"exponential_decay_length_penalty": (2, 1.4), "eos_token_id": EOS},
        lambda prompt: ExponentialDecayLengthPenalty((2, 1.4), [*EOS], prompt),
    ),
    "suppress_tokens": ({"suppress_tokens": [1, 8, 30]}, lambda _: SuppressTokensLogitsProcessor([1, 8, 30])),
    "begin_suppress_tokens": (
        {"begin_suppress_tokens": [1, 8, 30]},
        lambda prompt: SuppressTokensAtBeginLogitsProcessor([1, 8, 30], prompt),
    ),
}

jit_process_logits = jax.jit(gpt2_jax.logits_processors.process_logits)


def processed(backend: str, config: GenerationConfig, logits: np.ndarray, ids: np.ndarray, prompt: int) -> np.ndarray:
    """Return the logits after the prompt, the first `prompt` of `ids`, and its new tokens, with two ids of padding."""
    R, V = logits.shape
    padding, new = np.full(R, 2), ids.shape[1] - prompt
    history = padded_ids(np.pad(ids, ((0, 0), (2, 0))), padding, 40, 1)
    seen = seen_tokens(history, V)
    if backend == "torch":
        tokens = torch.from_numpy(history).long()
        processors = gpt2_torch.logits_processors.on_device(config, V, tokens.device)
        state = gpt2_torch.logits_processors.History(tokens, torch.from_numpy(seen), ids.shape[1] + 2, new)
        return gpt2_torch.logits_processors.process_logits(torch.tensor(logits), processors, state).numpy()
    known = gpt2_jax.logits_processors.History(history, seen, jnp.int32(ids.shape[1] + 2), jnp.int32(new))
    return np.asarray(jit_process_logits(logits, gpt2_jax.logits_processors.on_device(config, V), known))


@each_backend
@pytest.mark.parametrize("prompt", [1, PROMPT_LENGTH])
@pytest.mark.parametrize("name", HISTORY_PEERS)
def test_scores_are_those_of_transformers_at_every_step(name: str, prompt: int, backend: str) -> None:
    """Few distinct tokens, so that sequences repeat and biased ones are completed."""
    fields, make_peer = HISTORY_PEERS[name]
    logits = distinct_rows(257)
    ids = np.random.default_rng(8).integers(1, 6, (len(logits), prompt + STEPS))
    ids[0, :3], ids[1, -3:], ids[2, -3:] = (1, 2, 1), (9, 3, 1), 6
    config, changed = GenerationConfig(STEPS, **fields), 0
    for length in range(prompt, prompt + STEPS):
        expected = make_peer(prompt)(torch.from_numpy(ids[:, :length]), torch.tensor(logits)).numpy()
        found = processed(backend, config, logits, ids[:, :length], prompt)
        np.testing.assert_array_equal(found == -np.inf, expected == -np.inf)
        np.testing.assert_allclose(
            found, expected, rtol=UNITS, atol=UNITS * largest_term(name, logits, length - prompt)
        )
        changed += (expected != logits).any()
    assert changed or name in ("forced_bos_token_id", "no_repeat_ngram_size 20")


@each_backend
@pytest.mark.parametrize(("factor", "steps"), [(1e38, 2), (2.0, 20), (0.5, 20)])
def test_a_penalty_that_grows_without_bounds_stays_finite(factor: float, steps: int, backend: str) -> None:
    logits = np.array([[0.0, 3.0, -2.0, 1.0]] * 2, np.float32)
    config = GenerationConfig(steps + 1, exponential_decay_length_penalty=(-5000, factor), eos_token_id=(0, 1))
    found = processed(backend, config, logits, np.ones((2, 1 + steps), np.int64), 1)
    ended = [0.0, 0.0] if factor < 1 else [0.0, MOST_FAVOUR]
    np.testing.assert_allclose(found, [[*ended, -2.0, 1.0]] * 2, rtol=1e-6)


def largest_term(name: str, logits: np.ndarray, step: int) -> float:
    """Return the magnitude of the numbers that a processor adds, whose rounding remains where they cancel."""
    return 1.0 + (1.4**step * step * np.abs(logits).max() if name == "exponential_decay_length_penalty" else 0.0)


ALL_FIELDS: dict[str, Any] = {
    "sequence_bias": SEQUENCES,
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": BAD_WORDS,
    "min_new_tokens": 3,
    "forced_bos_token_id": 11,
    "forced_eos_token_id": EOS,
    "exponential_decay_length_penalty": (2, 1.4),
    "suppress_tokens": [1, 8, 30],
    "begin_suppress_tokens": [4, 9, 31],
    "eos_token_id": EOS,
}


@each_backend
@pytest.mark.parametrize("prompt", [1, PROMPT_LENGTH])
def test_all_processors_together_apply_in_the_order_of_transformers(prompt: int, backend: str) -> None:
    """The list of processors is the one that transformers' `generate` builds."""
    model = transformers_model(random_checkpoint(TINY))
    hf = transformers.GenerationConfig(
        **{**ALL_FIELDS, "sequence_bias": [[[*ids], bias] for ids, bias in SEQUENCES], "eos_token_id": [*EOS]}
    )
    model._prepare_special_tokens(hf, True)
    hf.max_length = prompt + STEPS
    theirs = model._get_logits_processor(hf, input_ids_seq_length=prompt, device="cpu")
    assert len(theirs) == len(ALL_FIELDS) - 1
    logits = distinct_rows(TINY.vocab_size)
    ids = np.random.default_rng(9).integers(1, 6, (len(logits), prompt + STEPS))
    for length in range(prompt, prompt + STEPS):
        expected = theirs(torch.from_numpy(ids[:, :length]), torch.tensor(logits)).numpy()
        found = processed(backend, GenerationConfig(STEPS, **ALL_FIELDS), logits, ids[:, :length], prompt)
        np.testing.assert_array_equal(found == -np.inf, expected == -np.inf)
        atol = 4 * UNITS * largest_term("exponential_decay_length_penalty", logits, length - prompt)
        np.testing.assert_allclose(found, expected, rtol=4 * UNITS, atol=atol)


@each_backend
def test_processors_that_are_off_return_the_logits_unchanged(backend: str) -> None:
    """Their values are neutral, so nothing is compiled for them."""
    neutral = {**NEUTRAL, "suppress_tokens": [], "bad_words_ids": [[EOS[0]]], "eos_token_id": EOS}
    config = GenerationConfig(9, temperature=1.0, **neutral)
    on = {name for name, value in LogitsProcessors.of(config, 257)._asdict().items() if value is not None}
    assert on == {"temperature"}
    logits = distinct_rows(257).astype(np.float16)
    found = processed(backend, config, logits, np.ones((len(logits), 3), int), 2)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, logits)


# Typical, epsilon and eta sampling


@pytest.mark.sampled(3)
@each_backend
@pytest.mark.parametrize("V", [7, 257, 50257])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("typical_p", p) for p in (1e-9, 0.2, 0.5, 0.9, 0.99)),
        *(("epsilon_cutoff", p) for p in (1e-5, 3e-4, 0.02, 0.3)),
        *(("eta_cutoff", p) for p in (1e-5, 3e-4, 0.02, 0.3)),
    ],
)
def test_truncation_keeps_what_transformers_keeps(backend: str, name: str, value: float, V: int) -> None:
    logits = distinct_rows(V)
    theirs = TRUNCATION_PEERS[name](value)(None, torch.tensor(logits)).numpy()
    found = FILTERS[backend][name](logits, value)
    undecided = truncation_rounding(name, value, logits)
    assert_keeps(theirs, logits, theirs > -np.inf, undecided)
    assert_keeps(found, logits, theirs > -np.inf, undecided)
    assert undecided.mean() < 0.02
    assert (found > -np.inf).any(-1).all()


def truncation_rounding(name: str, value: float, logits: np.ndarray) -> np.ndarray:
    """Return for which tokens float32 rounding decides."""
    p, exact = probabilities(logits), logits.astype(np.float64)
    shifted = exact - exact.max(-1, keepdims=True)
    information = np.log(np.exp(shifted).sum(-1, keepdims=True)) - shifted
    entropy = (p * information).sum(-1, keepdims=True)
    if name != "typical_p":
        cut = value if name == "epsilon_cutoff" else np.minimum(value, math.sqrt(value) * np.exp(-entropy))
        return np.abs(p / cut - 1) < INFORMATION * (1 + np.abs(logits).max(-1, keepdims=True))
    distance = np.abs(information - entropy)
    order = np.argsort(distance, axis=-1)
    before, sum_before = np.take_along_axis(p, order, -1).cumsum(-1), np.empty_like(p)
    np.put_along_axis(sum_before, order, before - np.take_along_axis(p, order, -1), -1)
    threshold = np.where(sum_before < value, distance, -np.inf).max(-1, keepdims=True)
    gap = np.abs(distance - threshold)
    rounding = INFORMATION * (1 + np.abs(logits).max(-1, keepdims=True) + entropy)
    close = (gap > 0) & (gap < rounding)  # such a token may change places with the last one that is kept
    close |= (gap == 0) & close.any(-1, keepdims=True)
    return close | (np.abs(sum_before - value) < TORCH_SUM * (sum_before > 0))


@pytest.mark.sampled(3)
@each_sample_token
@pytest.mark.parametrize("names", [("typical_p",), ("epsilon_cutoff",), ("eta_cutoff",), ("top_k", "typical_p")])
def test_truncated_distributions_are_sampled(sample_token: SampleToken, names: tuple[str, ...]) -> None:
    logits = np.random.default_rng(5).normal(scale=1.5, size=(1, 64)).astype(np.float32)
    values = {name: {"top_k": 40, "typical_p": 0.7, "epsilon_cutoff": 0.02, "eta_cutoff": 0.02}[name] for name in names}
    filtered = torch.tensor(logits)
    for name, value in values.items():
        filtered = ({"top_k": TopKLogitsWarper} | TRUNCATION_PEERS)[name](value)(None, filtered)  # type: ignore[arg-type]
    p = probabilities(filtered.numpy())[0]
    config = GenerationConfig(1, temperature=1.0, **values)  # type: ignore[arg-type]
    counts = np.bincount(sample_token(np.tile(logits, (DRAWS, 1)), NUMPYS, config, None), minlength=64)
    assert counts[p == 0].sum() == 0 and 1 < (p > 0).sum() < 64
    assert chi_square_p_value(counts, DRAWS * p) > LEAST_P_VALUE

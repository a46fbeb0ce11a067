"""Mixtures: exact proportions, every source in its own order, and any step as the first."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_jax.data import DataError, training_batches
from gpt2_jax.data.batches import Batch
from gpt2_jax.data.mixture import BLOCK, Mixture, examples_per_block
from gpt2_jax.data.tokens.stream import TokenStream, open_tokens
from tests.data.token_files import nanogpt

LENGTH = 4
SIZES = (401, 97, 53)
FIRST_IDS = (0, 10_000, 20_000)
"""The ids of each source count up from its first id, so an id names its source and its position."""


@pytest.fixture
def streams(tmp_path: Path) -> list[TokenStream]:
    files = zip(FIRST_IDS, SIZES, strict=True)
    return [open_tokens(nanogpt(tmp_path / f"{id}.bin", id + np.arange(size)))[0] for id, size in files]


def batches(stream: TokenStream | Mixture, number: int, **options: Any) -> list[Batch]:
    options = {"batch_size": 8, "seq_len": LENGTH, "seed": 3} | options
    return list(islice(training_batches(stream, **options), number))


def first_ids(read: list[Batch]) -> np.ndarray:
    return np.concatenate([batch["input_ids"][:, 0] for batch in read])


def test_each_block_has_the_exact_proportions(streams: list[TokenStream]) -> None:
    ids = first_ids(batches(Mixture.of(streams, [5, 2, 1]), 2 * BLOCK // 8))
    for block in (ids[:BLOCK], ids[BLOCK:]):
        assert Counter((block // 10_000).tolist()) == {0: BLOCK * 5 // 8, 1: BLOCK // 4, 2: BLOCK // 8}
    assert ((ids[:BLOCK] // 10_000) != (ids[BLOCK:] // 10_000)).any()  # each block has its own order


def test_the_sources_are_spread_over_a_block(streams: list[TokenStream]) -> None:
    of_source = first_ids(batches(Mixture.of(streams[:2], [3, 1]), BLOCK // 8)) // 10_000
    in_parts = of_source.reshape(16, -1).mean(axis=1)
    # The standard deviation of each part is 0.026.
    assert (abs(in_parts - 0.25) < 0.13).all()


def test_each_source_gives_the_examples_that_it_gives_alone(streams: list[TokenStream]) -> None:
    ids = first_ids(batches(Mixture.of(streams, [5, 2, 1]), BLOCK // 8))
    for first_id, stream in zip(FIRST_IDS, streams, strict=True):
        own = ids[(ids >= first_id) & (ids < first_id + 10_000)]
        alone = first_ids(batches(stream, -(-len(own) // 8)))
        np.testing.assert_array_equal(own, alone[: len(own)])


@pytest.mark.parametrize("step", [0, 5, BLOCK // 8 - 1, BLOCK // 8 + 3])
def test_any_step_can_be_the_first(streams: list[TokenStream], step: int) -> None:
    mixture = Mixture.of(streams, [0.5, 0.3, 0.2])
    for started, read in zip(batches(mixture, 3, start_step=step), batches(mixture, step + 3)[step:], strict=True):
        np.testing.assert_array_equal(started["input_ids"], read["input_ids"])
        np.testing.assert_array_equal(started["labels"], read["labels"])


def test_the_rows_of_the_processes_make_up_the_batch(streams: list[TokenStream]) -> None:
    mixture = Mixture.of(streams, [0.5, 0.3, 0.2])
    halves = [batches(mixture, 5, rows=rows) for rows in (slice(0, 4), slice(4, 8))]
    for whole, *parts in zip(batches(mixture, 5), *halves, strict=True):
        np.testing.assert_array_equal(whole["input_ids"], np.concatenate([part["input_ids"] for part in parts]))


def test_weights_are_rounded_by_largest_remainders() -> None:
    assert examples_per_block([1, 1, 1]) == (1366, 1365, 1365)
    assert examples_per_block([0.7, 0.2, 0.1]) == (2867, 819, 410)
    assert sum(examples_per_block(np.random.default_rng(0).random(37).tolist())) == BLOCK


def test_a_weight_that_would_never_be_drawn_is_refused(streams: list[TokenStream]) -> None:
    with pytest.raises(
        DataError, match=r"a weight of 1e-05 is 6.7e-06 of the sum of all weights; it must be .* 1/4096"
    ):
        Mixture.of(streams, [1, 1e-5, 0.5])


def test_the_fingerprint_depends_on_streams_order_and_weights(streams: list[TokenStream]) -> None:
    a, b, _ = streams
    mixtures = [([a, b], [1, 2]), ([a, b], [2, 1]), ([b, a], [1, 2]), ([a], [1])]
    prints = {Mixture.of(*mixture).fingerprint for mixture in mixtures}
    assert len(prints) == len(mixtures)
    assert Mixture.of([a, b], [2, 4]).fingerprint in prints

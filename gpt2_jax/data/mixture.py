"""Training data of several sources, mixed with fixed weights.

Every `BLOCK` consecutive examples contain the same number of examples of each source, in an order drawn from the seed
and the index of the block. The source of an example, and its index in that source, depend only on the index of the
example in the mixture. A resumed run therefore continues with the same examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int

from gpt2_jax.data.errors import DataError
from gpt2_jax.data.tokens.stream import TokenStream

BLOCK = 4096
"""The number of consecutive examples with exact proportions. A weight is rounded to a multiple of 1 / BLOCK of the
sum of all weights."""


@dataclass(frozen=True)
class Mixture:
    """Token streams, each of which gives a fixed fraction of the training examples, whatever its size."""

    streams: tuple[TokenStream, ...]
    examples_per_block: tuple[int, ...]
    """For each stream, the number of examples in each `BLOCK`. They add up to `BLOCK`."""

    @classmethod
    def of(cls, streams: Sequence[TokenStream], weights: Sequence[float]) -> Mixture:
        """Return streams mixed in proportion to positive weights, which need not sum to 1.

        Raises:
            DataError: a weight is so small that its stream would have no example in a block.
        """
        return cls(tuple(streams), examples_per_block(weights))

    def __len__(self) -> int:
        """Return the total number of tokens in the streams."""
        return sum(map(len, self.streams))

    @property
    def is_masked(self) -> bool:
        """Whether some tokens do not count in the loss."""
        return any(stream.is_masked for stream in self.streams)

    @property
    def fingerprint(self) -> str:
        """A hash of the streams and of their proportions."""
        parts = zip((stream.fingerprint for stream in self.streams), self.examples_per_block, strict=True)
        return hashlib.sha256(" ".join(f"{stream}:{count}" for stream, count in parts).encode()).hexdigest()


def examples_per_block(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the number of examples of each source in a block, by the largest remainder method.

    Raises:
        DataError: a weight is so small that its source would have no example in a block.

    Example:
        >>> examples_per_block([0.75, 0.25])
        (3072, 1024)
    """
    exact = np.asarray(weights, float) * (BLOCK / sum(weights))
    counts = np.floor(exact).astype(int)
    missing = BLOCK - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    if (counts == 0).any():
        which = int(np.argmin(counts))
        raise DataError(
            f"a weight of {weights[which]:g} is {weights[which] / sum(weights):.2g} of the sum of all weights; "
            f"it must be at least 1/{BLOCK}"
        )
    return tuple(counts.tolist())


def places(
    numbers: Sequence[int], counts: tuple[int, ...], seed: int
) -> Iterator[tuple[int, Int[np.ndarray, " N"], list[int]]]:
    """Yield, for each source: its index, the positions of its examples in `numbers`, and their indices in the source.

    Args:
        numbers: indices of examples in the mixture.
        counts: the number of examples of each source in a block.
    """
    located = [_located(number, counts, seed) for number in numbers]
    sources = np.array([source for source, _ in located], int)
    for source in np.unique(sources).tolist():
        at = np.flatnonzero(sources == source)
        yield source, at, [located[row][1] for row in at.tolist()]


def _located(number: int, counts: tuple[int, ...], seed: int) -> tuple[int, int]:
    """Return the source of an example, and the index of the example in it."""
    block, k = divmod(number, BLOCK)
    sources, ranks = _order(counts, seed, block)
    source = int(sources[k])
    return source, block * counts[source] + int(ranks[k])


@lru_cache(maxsize=8)
def _order(
    counts: tuple[int, ...], seed: int, block: int
) -> tuple[Int[np.ndarray, " BLOCK"], Int[np.ndarray, " BLOCK"]]:
    """Return the source of each example of a block, and how many examples of that source come before it."""
    # numpy guarantees that the raw output of a bit generator never changes, but not the result of a shuffle.
    random = np.random.PCG64(np.random.SeedSequence([seed, block, len(counts)])).random_raw(BLOCK)
    sources = np.repeat(np.arange(len(counts)), counts)[np.argsort(random, kind="stable")]
    ranks = np.empty(BLOCK, int)
    for source in range(len(counts)):
        own = sources == source
        ranks[own] = np.arange(own.sum())
    return sources, ranks

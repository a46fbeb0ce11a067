"""The logits processors of a `GenerationConfig` as values and arrays, from which each backend makes its own arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from bridge.generation.config import SAMPLING_FIELDS, GenerationConfig

PADDING = -1
"""Marks positions without a token in the ids of a `History`."""

ANY = -2
"""A wildcard in the prefixes of a `SequenceBias`. It also matches a position before the first token."""

MOST_FAVOUR = 1e30
"""Limit for the factor and the logits of the exponential decay length penalty, which grows with every token. A logit
within this limit stays finite in float32 when it is divided by a temperature."""


class SequenceBias(NamedTuple):
    """Biases of the tokens that complete a sequence. Axes: K sequences, W tokens of a prefix."""

    prefix_KW: Any
    """The tokens before the last one, left-padded with `ANY`."""
    token_K: Any
    """The last token."""
    bias_K: Any

    @classmethod
    def of(cls, pairs: Iterable[tuple[Sequence[int], float]]) -> SequenceBias | None:
        """Return the arrays, or None without pairs. Sizes are powers of two, so that few sizes are compiled.

        The later of two equal sequences replaces the earlier one, as in transformers.
        """
        biases = {tuple(ids): bias for ids, bias in pairs}
        if not biases:
            return None
        K, W = _power_of_two(len(biases)), _power_of_two(max(map(len, biases)))
        prefix_KW, token_K, bias_K = np.full((K, W), ANY, np.int32), np.zeros(K, np.int32), np.zeros(K, np.float32)
        for k, (ids, bias) in enumerate(biases.items()):
            prefix_KW[k, W - len(ids) + 1 :] = ids[:-1]
            token_K[k], bias_K[k] = ids[-1], bias
        return cls(prefix_KW, token_K, bias_K)


class LogitsProcessors(NamedTuple):
    """The processors in the order in which they apply. None disables a processor, so that it is not compiled.

    `of` makes numpy arrays and Python numbers. Each backend converts them. V is the size of the vocabulary.
    """

    sequence_bias: SequenceBias | None = None
    repetition_penalty: Any = None
    no_repeat_ngram_size: Any = None
    bad_words: SequenceBias | None = None
    min_new_tokens: Any = None
    forced_bos_token_id: Any = None
    last_step: Any = None
    """The index of the last new token, for `forced_eos_V`."""
    forced_eos_V: Any = None
    decay_start: Any = None
    decay_factor: Any = None
    suppressed_V: Any = None
    first_suppressed_V: Any = None
    eos_V: Any = None
    """The end-of-sequence tokens, if a processor depends on them."""
    temperature: Any = None
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None
    typical_p: Any = None
    epsilon_cutoff: Any = None
    eta_cutoff: Any = None

    @classmethod
    def of(cls, config: GenerationConfig, vocab_size: int) -> LogitsProcessors:
        """Return the processors that a configuration switches on."""

        def mask(ids: Any) -> Bool[np.ndarray, " V"] | None:
            return None if ids is None else np.isin(np.arange(vocab_size), np.ravel(ids))

        eos_mask = mask(config.eos_token_ids) if config.eos_token_ids else None
        minimum = config.active("min_new_tokens") if eos_mask is not None else None
        start, factor = (eos_mask is not None and config.exponential_decay_length_penalty) or (None, None)
        forced_eos = mask(config.active("forced_eos_token_id"))
        found: dict[str, Any] = {
            "sequence_bias": SequenceBias.of(config.sequence_bias or ()),
            "repetition_penalty": config.active("repetition_penalty"),
            "no_repeat_ngram_size": config.active("no_repeat_ngram_size"),
            "bad_words": _bad_words(config),
            "min_new_tokens": minimum,
            "forced_bos_token_id": config.forced_bos_token_id,
            "last_step": None if forced_eos is None else config.max_new_tokens - 1,
            "forced_eos_V": forced_eos,
            "decay_start": start,
            "decay_factor": factor,
            "suppressed_V": mask(config.active("suppress_tokens")),
            "first_suppressed_V": mask(config.active("begin_suppress_tokens")),
            "eos_V": None if minimum is None and start is None else eos_mask,
        }
        if not config.greedy:  # the other processors do not change the most likely token
            found |= {name: config.active(name) for name in ("temperature", *SAMPLING_FIELDS)}
        return cls(**found)

    @property
    def needs_ids(self) -> bool:
        """Whether a processor depends on the order of a row's tokens."""
        dependent = (self.sequence_bias, self.no_repeat_ngram_size, self.bad_words, self.forced_bos_token_id)
        return any(value is not None for value in dependent)

    @property
    def change_scores(self) -> bool:
        """Whether any processor is on, apart from those for sampling."""
        return any(getattr(self, name) is not None for name in self._fields if name not in _SAMPLING)


_SAMPLING = ("temperature", *SAMPLING_FIELDS)


def _bad_words(config: GenerationConfig) -> SequenceBias | None:
    words = [ids for ids in config.bad_words_ids or () if len(ids) > 1 or ids[0] not in config.eos_token_ids]
    return SequenceBias.of((ids, -np.inf) for ids in words)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def padded_ids(
    ids: Int[np.ndarray, "B T"], num_padding: Int[np.ndarray, " B"], length: int, copies: int
) -> Int[np.ndarray, "B*copies length"]:
    """Return the ids of a `History`: `copies` rows of each left-padded prompt, filled with `PADDING`."""
    found = np.full((len(ids), length), PADDING, np.int32)
    found[:, : ids.shape[1]] = np.where(np.arange(ids.shape[1]) < num_padding[:, None], PADDING, ids)
    return found.repeat(copies, axis=0)


def seen_tokens(ids: Int[np.ndarray, "R S"], vocab_size: int) -> Bool[np.ndarray, "R V"]:
    """Return which tokens each row of `padded_ids` contains."""
    seen = np.zeros((len(ids), vocab_size), bool)
    rows, places = np.nonzero(ids != PADDING)
    seen[rows, ids[rows, places]] = True
    return seen

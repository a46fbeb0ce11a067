"""The configuration of text generation, shared by both backends, and the random numbers for sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from bridge.config import GPT2Config
from bridge.errors import BridgeError
from bridge.generation.checks import problems

GREEDY_BELOW = 1e-6
"""Temperatures below this are treated as 0: the other tokens would have probability 0, and dividing by a much lower
temperature would overflow float32."""

NEUTRAL: Mapping[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""Processor -> its neutral value. Like None, this value disables it."""

SAMPLING_FIELDS = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Processors that only sampling uses. They never remove the most likely token."""


@dataclass(frozen=True)
class GenerationConfig:
    """How many tokens to generate, and how each token is selected.

    Fields that Hugging Face's `GenerationConfig` also has keep its names and meanings. The logits processors apply in
    the order of the fields, as in Hugging Face's `generate`. None disables a processor, and so does its
    neutral value, such as `top_k=0` or `top_p=1`.
    """

    max_new_tokens: int
    """Maximum number of new tokens. A row ends earlier at one of `eos_token_ids`."""
    _: KW_ONLY
    sequence_bias: Sequence[tuple[Sequence[int], float]] | None = None
    """(token ids, bias) pairs: add the bias to the last token's logit where the other tokens precede it."""
    repetition_penalty: float | None = None
    """Divide positive logits of tokens that already occurred by this, and multiply negative ones (Keskar et al. 2019).
    Above 1, such tokens are less likely."""
    no_repeat_ngram_size: int | None = None
    """No sequence of this many tokens occurs twice, the prompt included (Paulus et al. 2017)."""
    bad_words_ids: Sequence[Sequence[int]] | None = None
    """Sequences of tokens that are never completed. Sequences of one end-of-sequence token are ignored."""
    min_new_tokens: int | None = None
    """No end-of-sequence token before this many new tokens."""
    forced_bos_token_id: int | None = None
    """The first new token after a prompt of one token."""
    forced_eos_token_id: int | tuple[int, ...] | None = None
    """The last new token, if `max_new_tokens` are generated: this token, or one of these."""
    exponential_decay_length_penalty: tuple[int, float] | None = None
    """(start, factor): after `start` new tokens, add |logit| * (factor^n - 1) to end-of-sequence tokens, where n is the
    number of tokens since then."""
    suppress_tokens: Sequence[int] | None = None
    """Tokens that are never generated."""
    begin_suppress_tokens: Sequence[int] | None = None
    """Tokens that are never the first new token or, if `forced_bos_token_id` sets the first one, never the second."""
    temperature: float = 0.0
    """Divide the logits by this. 0 always takes the most likely token; 1 samples from the model's distribution."""
    top_k: int | None = None
    """With a temperature: sample from this many most likely tokens."""
    top_p: float | None = None
    """With a temperature: sample from the smallest set of most likely tokens whose total probability reaches this
    (Holtzman et al. 2020)."""
    min_p: float | None = None
    """With a temperature: sample from tokens with at least this fraction of the most likely token's probability
    (Nguyen et al. 2024)."""
    typical_p: float | None = None
    """With a temperature: sample from the smallest set of tokens whose total probability reaches this. Tokens whose
    information is closest to the entropy of the distribution come first (Meister et al. 2022)."""
    epsilon_cutoff: float | None = None
    """With a temperature: sample from tokens with at least this probability (Hewitt et al. 2022)."""
    eta_cutoff: float | None = None
    """With a temperature: sample from tokens with probability at least min(eta, sqrt(eta) * exp(-entropy)), where eta
    is this value (Hewitt et al. 2022)."""
    seed: int = 0
    """The same seed gives the same tokens. Backends differ only by rounding errors. A row does not depend on the other
    rows, so equal prompts in one call give equal texts."""
    num_return_sequences: int = 1
    """Number of outputs for each prompt."""
    eos_token_id: int | tuple[int, ...] | None = None
    """A row ends after this token, or after any of these tokens."""
    logprobs: bool = False
    """Return the log-probability of each selected token, in nats, from the logits before any processor."""
    slide: bool = False
    """When a row has used all positions of the model, continue from its last half. If False, exceeding the positions is
    an error."""
    num_beams: int = 1
    """Above 1: beam search with this many beams. The `num_return_sequences` best are returned."""
    length_penalty: float = 1.0
    """With beams: rank them by total score divided by the number of new tokens to this power. The score is the
    log-probability after the processors. Values above 0 favour longer texts."""
    early_stopping: bool | Literal["never"] = False
    """With beams: True ends the search when `num_beams` texts have ended. False also requires that no other beam ranks
    higher at its present length, and `never` that none can rank higher at any length."""

    @classmethod
    def of(cls, config: GenerationConfig | None, overrides: Mapping[str, Any]) -> GenerationConfig:
        """Return `config` with some fields replaced; without `config`, a new one with these fields."""
        return cls(**overrides) if config is None else replace(config, **overrides)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """`eos_token_id` as a tuple."""
        return () if self.eos_token_id is None else tuple(np.ravel(self.eos_token_id).tolist())

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    def active(self, name: str) -> Any:
        """Return the value of a processor, or None if it is disabled by its neutral value."""
        value = getattr(self, name)
        return None if value is None or value == NEUTRAL.get(name) or np.size(value) == 0 else value

    def after(self, new_tokens: int) -> GenerationConfig:
        """Return the configuration for the tokens that follow the first `new_tokens`."""
        if not new_tokens:
            return self
        minimum, decay = self.min_new_tokens, self.exponential_decay_length_penalty
        return replace(
            self,
            max_new_tokens=self.max_new_tokens - new_tokens,
            min_new_tokens=None if minimum is None else max(0, minimum - new_tokens),
            exponential_decay_length_penalty=None if decay is None else (decay[0] - new_tokens, decay[1]),
            forced_bos_token_id=None,
            begin_suppress_tokens=None,
        )

    def check(self, config: GPT2Config, prompts: Sequence[Sequence[int]]) -> None:
        """Raise a `BridgeError`, which is a `ValueError`, that names every invalid field."""
        if found := problems(self, config, prompts):
            raise BridgeError("; ".join(found))


def uniform_noise(config: GenerationConfig) -> Float[np.ndarray, "num_return_sequences max_new_tokens"]:
    """Return float32 numbers from [0, 1), one for each token of each output of a prompt.

    They do not depend on the prompt's index, so a row is the same alone and in a batch. They are multiples of 2**-23,
    computed from the raw output of Philox, which numpy guarantees to be stable.
    """
    keys = [np.array([config.seed, output], np.uint64) for output in range(config.num_return_sequences)]
    raw = np.stack([np.random.Philox(key=key).random_raw(config.max_new_tokens) for key in keys])
    return (raw >> np.uint64(41)).astype(np.float32) * np.float32(2.0**-23)

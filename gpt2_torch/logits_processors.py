"""The logits processors of every decoding method: functions of each row's logits and of its tokens so far.

They apply before sampling, in float32 or float64, as in transformers. A processor that removes tokens sets their logits
to minus infinity. `gpt2_torch.sampling` has the processors that only sampling uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridge.generation.config import GenerationConfig
from bridge.generation.processors import ANY, MOST_FAVOUR, LogitsProcessors, SequenceBias


@dataclass
class History:
    """The tokens of each row so far. S is the maximum length."""

    ids_RS: Int[Tensor, "R S"] | None
    """`bridge.generation.processors.PADDING` where no token is. None if no processor depends on the order."""
    seen_RV: Bool[Tensor, "R V"] | None
    """Which tokens each row contains. Only for the repetition penalty."""
    length: int
    """The number of positions in use, padding included."""
    num_new: int = 0
    """The number of tokens since the prompt."""

    def append(self, token_R: Int[Tensor, " R"]) -> None:
        """Add one token to each row, in place."""
        if self.ids_RS is not None and self.length < self.ids_RS.shape[1]:
            self.ids_RS[:, self.length] = token_R
        if self.seen_RV is not None:
            self.seen_RV.scatter_(1, token_R[:, None], True)
        self.length, self.num_new = self.length + 1, self.num_new + 1

    def select_rows(self, rows_R: Int[Tensor, " R"]) -> History:
        """Return a copy with these rows. A row may occur more than once."""
        ids_RS, seen_RV = (None if x is None else x[rows_R] for x in (self.ids_RS, self.seen_RV))
        return History(ids_RS, seen_RV, self.length, self.num_new)


def on_device(config: GenerationConfig, vocab_size: int, device: torch.device) -> LogitsProcessors:
    """Return the processors of `config`, with tensors on the device."""

    def to_tensor(value: Any) -> Any:
        if isinstance(value, SequenceBias):
            return SequenceBias(*map(to_tensor, value))
        if not isinstance(value, np.ndarray):
            return value
        return torch.from_numpy(value.astype(np.int64) if value.dtype == np.int32 else value).to(device)

    return LogitsProcessors(*map(to_tensor, LogitsProcessors.of(config, vocab_size)))


def process_logits(logits_RV: Float[Tensor, "R V"], p: LogitsProcessors, history: History) -> Float[Tensor, "R V"]:
    """Apply all processors but those of sampling, in transformers' order."""
    if not p.change_scores:
        return logits_RV
    logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    ids_RS, seen_RV, n = history.ids_RS, history.seen_RV, history.num_new
    if p.sequence_bias is not None and ids_RS is not None:
        logits_RV = add_sequence_bias(logits_RV, ids_RS[:, : history.length], p.sequence_bias)
    if p.repetition_penalty is not None and seen_RV is not None:
        logits_RV = penalize_repetition(logits_RV, seen_RV, p.repetition_penalty)
    if p.no_repeat_ngram_size is not None and ids_RS is not None:
        logits_RV = forbid_repeated_ngrams(logits_RV, ids_RS[:, : history.length], p.no_repeat_ngram_size)
    if p.bad_words is not None and ids_RS is not None:
        logits_RV = add_sequence_bias(logits_RV, ids_RS[:, : history.length], p.bad_words)
    if p.min_new_tokens is not None and n < p.min_new_tokens:
        logits_RV = logits_RV.masked_fill(p.eos_V, -torch.inf)
    is_forced_R1 = None
    if p.forced_bos_token_id is not None and ids_RS is not None:
        is_forced_R1 = (ids_RS >= 0).sum(-1, keepdim=True) == n + 1  # the prompt has one token
        if n == 0:
            only_RV = torch.full_like(logits_RV, -torch.inf)
            only_RV[:, p.forced_bos_token_id] = 0.0
            logits_RV = torch.where(is_forced_R1, only_RV, logits_RV)
    if p.forced_eos_V is not None and n == p.last_step:
        logits_RV = torch.zeros_like(logits_RV).masked_fill(~p.forced_eos_V, -torch.inf)
    if p.decay_start is not None and n > p.decay_start:
        logits_RV = favour_end(logits_RV, p.eos_V, n - p.decay_start, p.decay_factor)
    if p.suppressed_V is not None:
        logits_RV = logits_RV.masked_fill(p.suppressed_V, -torch.inf)
    if p.first_suppressed_V is not None and n < 2:
        is_first_R1 = torch.tensor(n == 0) if is_forced_R1 is None else is_forced_R1 == (n == 1)
        logits_RV = logits_RV.masked_fill(p.first_suppressed_V & is_first_R1.to(logits_RV.device), -torch.inf)
    return logits_RV


def add_sequence_bias(
    logits_RV: Float[Tensor, "R V"], ids_RT: Int[Tensor, "R T"], biases: SequenceBias
) -> Float[Tensor, "R V"]:
    """Add the bias of each sequence whose last token would be the next one. A bias of minus infinity removes it."""
    W = biases.prefix_KW.shape[1]
    tail_RW = torch.nn.functional.pad(ids_RT[:, -W:], (max(0, W - ids_RT.shape[1]), 0), value=ANY)
    matches_RK = ((tail_RW[:, None] == biases.prefix_KW) | (biases.prefix_KW == ANY)).all(-1)
    added_RK = torch.where(matches_RK, biases.bias_K, 0.0).to(logits_RV.dtype)
    return logits_RV + torch.zeros_like(logits_RV).index_add_(1, biases.token_K, added_RK)


def penalize_repetition(
    logits_RV: Float[Tensor, "R V"], seen_RV: Bool[Tensor, "R V"], penalty: float
) -> Float[Tensor, "R V"]:
    """Divide positive logits of seen tokens by `penalty`, and multiply negative ones (Keskar et al. 2019)."""
    return torch.where(seen_RV, torch.where(logits_RV > 0, logits_RV / penalty, logits_RV * penalty), logits_RV)


def forbid_repeated_ngrams(
    logits_RV: Float[Tensor, "R V"], ids_RT: Int[Tensor, "R T"], size: int
) -> Float[Tensor, "R V"]:
    """Remove the tokens that would complete a sequence of `size` tokens which the row contains (Paulus et al. 2017)."""
    if ids_RT.shape[1] < size:
        return logits_RV
    windows_RNS = ids_RT.unfold(1, size, 1)
    prefix_R1S = ids_RT[:, None, ids_RT.shape[1] + 1 - size :]
    matches_RN = (windows_RNS[..., :-1] == prefix_R1S).all(-1) & (windows_RNS[..., -1] >= 0)
    forbidden_RV = torch.zeros(logits_RV.shape[0], logits_RV.shape[1] + 1, dtype=torch.bool, device=logits_RV.device)
    forbidden_RV.scatter_(1, torch.where(matches_RN, windows_RNS[..., -1], logits_RV.shape[1]), True)
    return logits_RV.masked_fill(forbidden_RV[:, :-1], -torch.inf)


def favour_end(
    logits_RV: Float[Tensor, "R V"], eos_V: Bool[Tensor, " V"], steps: int, factor: float
) -> Float[Tensor, "R V"]:
    """Add |logit| * (factor^steps - 1) to end-of-sequence tokens. The factor and the result are limited."""
    power = math.exp(min(steps * math.log(factor), math.log(MOST_FAVOUR)))
    favoured_RV = (logits_RV + logits_RV.abs() * (power - 1.0)).clamp(max=MOST_FAVOUR)
    return torch.where(eos_V & logits_RV.isfinite(), favoured_RV, logits_RV)

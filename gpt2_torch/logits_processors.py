"""Selection of the next token from its logits: pure functions of each row.

The repetition penalty keeps the dtype of the logits; sampling with a temperature computes in float32 or float64. The
`keep_` functions set the logits of the tokens that they remove to minus infinity.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridge.generation.config import GenerationConfig


def sample_token(
    logits_RV: Float[Tensor, "R V"],
    noise_R: Float[Tensor, " R"],
    config: GenerationConfig,
    seen_RV: Bool[Tensor, "R V"] | None,
) -> Int[Tensor, " R"]:
    """Return the next token of each row: the most likely one or, with a temperature, a sample.

    Args:
        noise_R: numbers from [0, 1). Each determines the sample of its row.
        seen_RV: which tokens each row contains, for the repetition penalty.
    """
    if config.repetition_penalty is not None and seen_RV is not None:
        logits_RV = penalize_repetition(logits_RV, seen_RV, config.repetition_penalty)
    if config.greedy:
        return logits_RV.argmax(-1)
    logits_RV = logits_RV.float() / config.temperature
    if config.top_k is not None:
        logits_RV = keep_top_k(logits_RV, config.top_k)
    if config.top_p is not None:
        logits_RV = keep_top_p(logits_RV, config.top_p)
    if config.min_p is not None:
        logits_RV = keep_min_p(logits_RV, config.min_p)
    return inverse_cdf_sample(logits_RV, noise_R)


def penalize_repetition(
    logits_RV: Float[Tensor, "R V"], seen_RV: Bool[Tensor, "R V"], penalty: float
) -> Float[Tensor, "R V"]:
    """Divide positive logits of seen tokens by `penalty`, and multiply negative ones (Keskar et al. 2019)."""
    return torch.where(seen_RV, torch.where(logits_RV > 0, logits_RV / penalty, logits_RV * penalty), logits_RV)


def keep_top_k(logits_RV: Float[Tensor, "R V"], k: int) -> Float[Tensor, "R V"]:
    """Keep the k most likely tokens, and tokens as likely as the last of them (Fan et al. 2018)."""
    return _keep_from(logits_RV, logits_RV.topk(min(k, logits_RV.shape[-1])).values[:, -1:])


def keep_top_p(logits_RV: Float[Tensor, "R V"], p: float) -> Float[Tensor, "R V"]:
    """Keep the smallest set of most likely tokens whose total probability reaches p (Holtzman et al. 2020).

    Tokens as likely as the last of the set are kept too.
    """
    if p >= 1.0:
        return logits_RV  # all tokens, even if rounding reaches 1 before the last
    sorted_RV = logits_RV.sort(descending=True).values
    probs_RV = sorted_RV.double().softmax(-1)  # in float32, torch's sum over 50257 tokens is wrong by 1e-5
    count_R1 = (probs_RV.cumsum(-1) - probs_RV < p).sum(-1, keepdim=True)
    return _keep_from(logits_RV, sorted_RV.gather(-1, (count_R1 - 1).clamp(min=0)))


def keep_min_p(logits_RV: Float[Tensor, "R V"], p: float) -> Float[Tensor, "R V"]:
    """Keep tokens with at least p times the most likely token's probability (Nguyen et al. 2024)."""
    return _keep_from(logits_RV, logits_RV.amax(-1, keepdim=True) + (math.log(p) if p else -math.inf))


def inverse_cdf_sample(logits_RV: Float[Tensor, "R V"], noise_R: Float[Tensor, " R"]) -> Int[Tensor, " R"]:
    """Return the first token whose cumulative probability exceeds the noise.

    The same noise gives the same token in both backends, except for rounding.
    """
    # float64 rounds as little as the blockwise sums in `gpt2_jax`.
    cumulative_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)).exp().double().cumsum(-1)
    target_R1 = noise_R[:, None].double() * cumulative_RV[:, -1:]
    found_R1 = torch.searchsorted(cumulative_RV, target_R1, right=True)
    return found_R1[:, 0].clamp(max=logits_RV.shape[-1] - 1)  # NaN logits give an index past the last


def _keep_from(logits_RV: Float[Tensor, "R V"], threshold_R1: Float[Tensor, "R 1"]) -> Float[Tensor, "R V"]:
    return logits_RV.masked_fill(logits_RV < threshold_R1, -torch.inf)

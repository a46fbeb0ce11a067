"""Selection of the next token from its logits: greedily, or by sampling. Pure functions of each row.

Sampling computes in float32 or float64. The `keep_` functions set the logits of the tokens that they remove to minus
infinity.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridge.generation.processors import LogitsProcessors


def select_token(
    logits_RV: Float[Tensor, "R V"], noise_R: Float[Tensor, " R"], p: LogitsProcessors
) -> Int[Tensor, " R"]:
    """Return the next token of each row: the most likely one or, with a temperature, a sample.

    Args:
        noise_R: numbers from [0, 1). Each determines the sample of its row.
    """
    if p.temperature is None:
        return logits_RV.argmax(-1)
    return inverse_cdf_sample(truncate(logits_RV, p), noise_R)


def truncate(logits_RV: Float[Tensor, "R V"], p: LogitsProcessors) -> Float[Tensor, "R V"]:
    """Divide the logits by the temperature and apply the processors that only sampling uses, in transformers' order."""
    logits_RV = logits_RV.float() / p.temperature
    if p.top_k is not None:
        logits_RV = keep_top_k(logits_RV, p.top_k)
    if p.top_p is not None:
        logits_RV = keep_top_p(logits_RV, p.top_p)
    if p.min_p is not None:
        logits_RV = keep_min_p(logits_RV, p.min_p)
    if p.typical_p is not None:
        logits_RV = keep_typical(logits_RV, p.typical_p)
    if p.epsilon_cutoff is not None:
        logits_RV = keep_epsilon(logits_RV, p.epsilon_cutoff)
    if p.eta_cutoff is not None:
        logits_RV = keep_eta(logits_RV, p.eta_cutoff)
    return logits_RV


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


def keep_typical(logits_RV: Float[Tensor, "R V"], p: float) -> Float[Tensor, "R V"]:
    """Keep the smallest set of tokens whose total probability reaches p, the most typical first (Meister et al. 2022).

    A token is the more typical, the closer its information is to the entropy. Tokens as typical as the last of the set
    are kept too.
    """
    logprobs_RV = logits_RV.log_softmax(-1)
    distance_RV = (-logprobs_RV - _entropy(logprobs_RV)).abs()
    sorted_RV, order_RV = distance_RV.sort()
    probs_RV = logprobs_RV.double().exp().gather(-1, order_RV)  # float64 as in `keep_top_p`
    last_R1 = (probs_RV.cumsum(-1) < p).sum(-1, keepdim=True).clamp(max=logits_RV.shape[-1] - 1)
    return logits_RV.masked_fill(distance_RV > sorted_RV.gather(-1, last_R1), -torch.inf)


def keep_epsilon(logits_RV: Float[Tensor, "R V"], epsilon: float) -> Float[Tensor, "R V"]:
    """Keep the most likely token, and tokens with a probability of at least `epsilon` (Hewitt et al. 2022)."""
    return _keep_or_most_likely(logits_RV, logits_RV.softmax(-1) >= epsilon)


def keep_eta(logits_RV: Float[Tensor, "R V"], epsilon: float) -> Float[Tensor, "R V"]:
    """Keep the most likely token, and tokens with a probability of at least min(epsilon, sqrt(epsilon) exp(-entropy)).

    Source: Hewitt et al. 2022, section 4.3.
    """
    logprobs_RV = logits_RV.log_softmax(-1)
    eta_R1 = (math.sqrt(epsilon) * (-_entropy(logprobs_RV)).exp()).clamp(max=epsilon)
    return _keep_or_most_likely(logits_RV, logprobs_RV.exp() >= eta_R1)


def _entropy(logprobs_RV: Float[Tensor, "R V"]) -> Float[Tensor, "R 1"]:
    """Return the entropy in nats. Removed tokens contribute nothing."""
    return -(logprobs_RV.exp() * logprobs_RV).nansum(-1, keepdim=True)


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


def _keep_or_most_likely(logits_RV: Float[Tensor, "R V"], keeps_RV: Bool[Tensor, "R V"]) -> Float[Tensor, "R V"]:
    return logits_RV.masked_fill(~keeps_RV & (logits_RV < logits_RV.amax(-1, keepdim=True)), -torch.inf)

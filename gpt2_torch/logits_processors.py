"""How the next token is chosen from its logits: pure functions, row by row, in float32.

A filter gives the logits with those it forbids at minus infinity.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridge.generation.config import GenerationConfig


def choose(
    logits_RV: Float[Tensor, "R V"],
    draws_R: Float[Tensor, " R"],
    request: GenerationConfig,
    seen_RV: Bool[Tensor, "R V"] | None,
) -> Int[Tensor, " R"]:
    """The next token of each row: drawn with a number from [0, 1), or without a temperature the likeliest.

    `seen_RV`: the tokens that a row has, for the repetition penalty.
    """
    if request.repetition_penalty is not None and seen_RV is not None:
        logits_RV = penalize_repetition(logits_RV, seen_RV, request.repetition_penalty)
    if request.greedy:
        return logits_RV.argmax(-1)
    logits_RV = logits_RV.float() / request.temperature
    if request.top_k is not None:
        logits_RV = keep_top_k(logits_RV, request.top_k)
    if request.top_p is not None:
        logits_RV = keep_top_p(logits_RV, request.top_p)
    if request.min_p is not None:
        logits_RV = keep_min_p(logits_RV, request.min_p)
    return draw(logits_RV, draws_R)


def penalize_repetition(
    logits_RV: Float[Tensor, "R V"], seen_RV: Bool[Tensor, "R V"], penalty: float
) -> Float[Tensor, "R V"]:
    """Logits of tokens that were there, divided by `penalty` where positive, else multiplied (Keskar et al. 2019)."""
    return torch.where(seen_RV, torch.where(logits_RV > 0, logits_RV / penalty, logits_RV * penalty), logits_RV)


def keep_top_k(logits_RV: Float[Tensor, "R V"], k: int) -> Float[Tensor, "R V"]:
    """The k likeliest tokens, and those as likely as the last of them (Fan et al. 2018)."""
    return _keep_from(logits_RV, logits_RV.topk(min(k, logits_RV.shape[-1])).values[:, -1:])


def keep_top_p(logits_RV: Float[Tensor, "R V"], p: float) -> Float[Tensor, "R V"]:
    """Those than which all likelier ones together have a probability below p (Holtzman et al. 2020)."""
    if p >= 1.0:
        return logits_RV  # all, also where rounding reaches 1 before the last
    sorted_RV = logits_RV.sort(descending=True).values
    probs_RV = sorted_RV.double().softmax(-1)  # in float32 torch's sum over 50257 of them is 1e-5 off
    kept_R1 = (probs_RV.cumsum(-1) - probs_RV < p).sum(-1, keepdim=True)
    return _keep_from(logits_RV, sorted_RV.gather(-1, (kept_R1 - 1).clamp(min=0)))


def keep_min_p(logits_RV: Float[Tensor, "R V"], p: float) -> Float[Tensor, "R V"]:
    """Those with at least p times the probability of the likeliest (Nguyen et al. 2024)."""
    return _keep_from(logits_RV, logits_RV.amax(-1, keepdim=True) + (math.log(p) if p else -math.inf))


def draw(logits_RV: Float[Tensor, "R V"], draws_R: Float[Tensor, " R"]) -> Int[Tensor, " R"]:
    """The token at which the cumulative probability passes the draw: of one number, the same in any backend."""
    # In float64, as short as the sums in `gpt2_jax` that go by blocks.
    upto_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)).exp().double().cumsum(-1)
    wanted_R1 = draws_R[:, None].double() * upto_RV[:, -1:]
    return torch.searchsorted(upto_RV, wanted_R1, right=True)[:, 0].clamp(
        max=logits_RV.shape[-1] - 1
    )  # of NaN: past it


def _keep_from(logits_RV: Float[Tensor, "R V"], threshold_R1: Float[Tensor, "R 1"]) -> Float[Tensor, "R V"]:
    return logits_RV.masked_fill(logits_RV < threshold_R1, -torch.inf)

"""Sampling from the reference: the whole sequence again for every token, no cache."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridge.sampling import GREEDY_BELOW, check_request
from gpt2_torch.model import GPT2, check_inputs


@torch.no_grad()  # not inference_mode: a model can be trained on the ids that come out
def generate(
    model: GPT2,
    input_ids: Int[Tensor, "B T"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Int[Tensor, "B T_plus_new"]:
    """The prompts, each followed by `max_new_tokens` sampled tokens.

    Args:
        temperature: logits are divided by it before sampling; 0 takes the likeliest token.
        top_k: sample among this many likeliest tokens only.
        seed: the same seed gives the same tokens.

    Raises `ValueError` for a request that cannot be honoured (`bridge.sampling`), and `IndexError`
    for an id outside the vocabulary.
    """
    check_inputs(model.config, input_ids)
    check_request(model.config, input_ids.shape[1], max_new_tokens, temperature, top_k, seed)
    generator = torch.Generator(input_ids.device).manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            next_ids = _sample(model(input_ids)[:, -1], temperature, top_k, generator)
            input_ids = torch.cat([input_ids, next_ids[:, None]], dim=1)
    finally:
        model.train(was_training)
    return input_ids


def _sample(
    logits_BV: Float[Tensor, "B V"], temperature: float, top_k: int | None, generator: torch.Generator
) -> Int[Tensor, " B"]:
    if temperature < GREEDY_BELOW:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.float() / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        least = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, -torch.inf)
    return torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator)[:, 0]

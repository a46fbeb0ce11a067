"""What a request to generate must satisfy, the same in both backends."""

from __future__ import annotations

import math

from bridge.config import GPT2Config
from bridge.errors import BridgeError

LARGEST_SEED = 2**32 - 1

GREEDY_BELOW = 1e-6
"""Temperatures below this take the likeliest token, as 0 does: the others' chances are nil, and float32
overflows where logits are divided by much less."""


def check_request(
    config: GPT2Config, prompt_length: int, max_new_tokens: int, temperature: float, top_k: int | None, seed: int
) -> None:
    """Raise `BridgeError`, which is a `ValueError`, naming every argument that cannot be honoured."""
    total = prompt_length + max_new_tokens
    problems = []
    if prompt_length < 1:
        problems.append("the prompt is empty; give at least one token to go on from")
    if max_new_tokens < 0:
        problems.append(f"max_new_tokens={max_new_tokens}: must not be negative")
    elif total > config.n_positions:
        problems.append(f"{total} tokens with the prompt; the model has n_positions={config.n_positions}")
    if not (math.isfinite(temperature) and temperature >= 0):
        problems.append(f"temperature={temperature}: must be 0, for the likeliest token, or positive and finite")
    if top_k is not None and top_k < 1:
        problems.append(f"top_k={top_k}: must be at least 1")
    if not 0 <= seed <= LARGEST_SEED:
        problems.append(f"seed={seed}: must be between 0 and {LARGEST_SEED}")
    if problems:
        raise BridgeError("; ".join(problems))

"""Small models for tests. Their sizes are pairwise different, and all parameters are random.

Biases of zero and LayerNorm scales of one would hide permuted rows, and equal sizes would hide a transpose.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

import bridge
from bridge import Checkpoint, GPT2Config

TINY = GPT2Config(vocab_size=257, n_positions=40, n_embd=48, n_layer=5, n_head=3, n_inner=100)

SMALLEST = GPT2Config(vocab_size=11, n_positions=5, n_embd=8, n_layer=2, n_head=2, n_inner=12)
"""Small enough that a checkpoint file consists mainly of headers."""


def config_for(format: str, config: GPT2Config = TINY) -> GPT2Config:
    """Return the most similar configuration that a format can store."""
    if format in ("nanogpt", "llmc"):
        config = replace(config, n_inner=None)
    return replace(config, activation_function="gelu") if format == "nanogpt" else config


def random_state(config: GPT2Config, dtype: np.dtype | type = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Return a canonical state_dict. Weights are large enough that any mistake changes the logits noticeably."""
    rng = np.random.default_rng(seed)
    state = {}
    for p in bridge.parameters(config):
        values = rng.normal(scale=0.2, size=p.torch_shape)
        is_norm = ".ln_" in f".{p.torch_name}" and p.torch_name.endswith("weight")
        state[p.torch_name] = (values + 1.0 if is_norm else values).astype(dtype)
    return state


def random_checkpoint(config: GPT2Config = TINY, dtype: np.dtype | type = np.float32, seed: int = 0) -> Checkpoint:
    return Checkpoint.of(random_state(config, dtype, seed), config)


def huggingface_directory(path: Path, config: GPT2Config = TINY, **kwargs: object) -> Path:
    """Write a random model of this configuration to `path` with this project."""
    bridge.save(random_checkpoint(config, **kwargs), path, format="huggingface")  # type: ignore[arg-type]
    return path


def random_ids(config: GPT2Config, batch: int = 2, length: int = 17, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length))

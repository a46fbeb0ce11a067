"""`gpt2 generate`: sample text from the reference or the port."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

import bridge
from gpt2_jax.cli.output import console, require_torch, write_json


def generate(
    source: Positional[str],
    prompt: Positional[str],
    /,
    *,
    backend: Literal["jax", "torch"] = "jax",
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    json: Path | None = None,
) -> None:
    """Continue a prompt.

    Example: gpt2 generate ./my-gpt2 "Once upon a time" --temperature 0.8 --top-k 50

    Args:
        source: a checkpoint directory or a Hugging Face id.
        prompt: the text to continue.
        backend: which implementation runs.
        max_new_tokens: how many tokens to add.
        temperature: 0 takes the likeliest token, 1 samples as the model predicts.
        top_k: sample among this many likeliest tokens only.
        seed: the same seed gives the same text.
        json: also write prompt, text and ids to this file.
    """
    checkpoint = bridge.load(source)
    tokenizer = checkpoint.tokenizer()
    ids = tokenizer.encode_ordinary(prompt)
    _require_sensible(checkpoint, len(ids), max_new_tokens, temperature, top_k)
    run = _with_torch if backend == "torch" else _with_jax
    new = run(checkpoint, ids, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed)
    text = tokenizer.decode(new)
    write_json(json, {"source": source, "backend": backend, "prompt": prompt, "text": text, "ids": new})
    console().print(text, markup=False, highlight=False, soft_wrap=True)


def _with_torch(checkpoint: bridge.Checkpoint, ids: list[int], **sampling: Any) -> list[int]:
    require_torch("--backend torch")
    import torch

    import gpt2_torch

    model = gpt2_torch.model_from_checkpoint(checkpoint)
    return gpt2_torch.generate(model, torch.tensor([ids]), **sampling)[0].tolist()


def _with_jax(checkpoint: bridge.Checkpoint, ids: list[int], **sampling: Any) -> list[int]:
    import jax.numpy as jnp

    import gpt2_jax

    model, params = gpt2_jax.model_from_checkpoint(checkpoint)
    return gpt2_jax.generate(model, params, jnp.asarray([ids]), **sampling)[0].tolist()


def _require_sensible(
    checkpoint: bridge.Checkpoint, n_prompt: int, n_new: int, temperature: float, top_k: int | None
) -> None:
    limit = checkpoint.config.n_positions
    if n_prompt == 0:
        raise bridge.BridgeError("the prompt is empty; give at least one token")
    if n_new < 1 or n_prompt + n_new > limit:
        raise bridge.BridgeError(
            f"--max-new-tokens {n_new} after a prompt of {n_prompt}: it must be at least 1, and at most {limit} in all"
        )
    if not temperature >= 0 or (top_k is not None and top_k < 1):
        raise bridge.BridgeError("--temperature must not be negative, and --top-k at least 1")

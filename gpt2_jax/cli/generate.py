"""`gpt2 generate`: sample text from the reference or the port."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

import bridge
from bridge.sampling import check_request
from bridge.tokenizer import decode_known
from gpt2_jax.cli.arguments import BUNDLED, JsonFile, SourceOrBundled
from gpt2_jax.cli.models import jax_model
from gpt2_jax.cli.output import console, json_writer, require_torch


def generate(
    source: SourceOrBundled = BUNDLED,
    prompt: Annotated[Positional[str | None], arg(metavar="PROMPT")] = None,
    /,
    *,
    backend: Literal["jax", "torch"] = "jax",
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    top_k: Annotated[int | None, arg(metavar="INT")] = None,
    seed: int = 0,
    json: JsonFile = None,
) -> None:
    """Continue a prompt.

    Example: gpt2 generate ./my-gpt2 "Once upon a time" --temperature 0.8 --top-k 50

    Args:
        source: a checkpoint directory, a run, a Hugging Face id, or `bundled`.
        prompt: the text to continue; a line break, if none is given.
        backend: which implementation runs.
        max_new_tokens: how many tokens to add.
        temperature: 0 takes the likeliest token, 1 samples as the model predicts.
        top_k: with a temperature: sample among this many likeliest tokens only.
        seed: the same seed gives the same text on the same backend.
        json: also write prompt, text and ids to this file.
    """
    write_json = json_writer(json)
    prompt = "\n" if prompt is None else prompt
    checkpoint = bridge.load(source)
    new = continued(
        backend, checkpoint, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
    )
    text = decode_known(checkpoint.tokenizer(), new)
    write_json({"source": source, "backend": backend, "prompt": prompt, "text": text, "ids": new})
    console().print(text, soft_wrap=True)


def continued(
    backend: str,
    checkpoint: bridge.Checkpoint,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> list[int]:
    """The ids of the prompt and what the model adds to it."""
    ids = checkpoint.tokenizer().encode_ordinary(prompt)
    check_request(checkpoint.config, len(ids), max_new_tokens, temperature, top_k, seed)
    run = _with_torch if backend == "torch" else _with_jax
    return run(checkpoint, ids, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed)


def _with_torch(checkpoint: bridge.Checkpoint, ids: list[int], **sampling: Any) -> list[int]:
    require_torch("--backend torch")
    import torch

    import gpt2_torch

    model = gpt2_torch.model_from_checkpoint(checkpoint)
    return gpt2_torch.generate(model, torch.tensor([ids]), **sampling)[0].tolist()


def _with_jax(checkpoint: bridge.Checkpoint, ids: list[int], **sampling: Any) -> list[int]:
    import jax.numpy as jnp

    import gpt2_jax

    with jax_model(checkpoint) as (model, params):
        return gpt2_jax.generate(model, params, jnp.asarray([ids]), **sampling)[0].tolist()

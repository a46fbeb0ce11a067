"""Evaluation between training steps: the validation loss and samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bridge import TokenizerError
from bridge.generation.text import printable
from gpt2_jax.data import Data, TokenStream, evaluation_batches
from gpt2_jax.generation import generate
from gpt2_jax.model import GPT2
from gpt2_jax.training.batch_placement import microbatch_rows
from gpt2_jax.training.config import TrainConfig
from gpt2_jax.training.errors import NonFiniteLoss, TrainingError
from gpt2_jax.training.partial import whole_params
from gpt2_jax.training.state import TrainState, examples_of
from gpt2_jax.training.step import EvalStep

SAMPLE_TEMPERATURE = 0.8


def validation_loss(
    eval_step: EvalStep,
    config: TrainConfig,
    data: Data,
    state: TrainState,
    mesh: Mesh,
    check: Callable[[], object] = lambda: None,
) -> float:
    """Return the mean loss over the validation data in nats per token. Uses the EMA of the weights if there is one.

    `check` is called before every batch and may raise to end the evaluation. Raises `TrainingError` if there is nothing
    to predict, and its subclass `NonFiniteLoss` if the loss is NaN or infinite.
    """
    rows = microbatch_rows(config, mesh)
    batches = evaluation_batches(
        require_validation(data),
        batch_size=rows.size,
        seq_len=config.seq_len,
        max_batches=config.eval_batches and config.eval_batches * config.num_microbatches,
        examples=examples_of(config, data),
        rows=rows.own,
    )
    sums: list[tuple[jax.Array, jax.Array]] = []
    for batch in batches:
        check()
        jax.block_until_ready(sums[-2:-1])  # at most one batch ahead, to handle a signal promptly
        sums.append(eval_step(weights(state), rows.put(batch), state.frozen))
    count = sum(int(count) for _, count in sums)
    if not count:
        raise TrainingError(f"the validation data has nothing to predict, because {_why_nothing_counts(config, data)}")
    mean = sum(float(loss) for loss, _ in sums) / count
    if not math.isfinite(mean):
        raise NonFiniteLoss(f"step {state.step}: validation loss {mean}")
    return mean


def _why_nothing_counts(config: TrainConfig, data: Data) -> str:
    if require_validation(data).counts is not None:
        return (
            f"none of its windows of seq_len={config.seq_len} tokens has a token that counts; raise --seq-len, or give "
            "more data with --validation-data"
        )
    return (
        "each of its documents is a single token; raise --validation-fraction, or give more data with --validation-data"
    )


def require_validation(data: Data) -> TokenStream:
    """Return the validation data. Raises `TrainingError` if the run has no validation data."""
    if data.validation is None:
        raise TrainingError("there is no validation data; open the data with a validation_fraction above 0")
    return data.validation


def encoded_prompt(config: TrainConfig, data: Data) -> list[int]:
    """Return the token ids of the sample prompt, empty if no samples are printed."""
    if data.tokenizer is None or not config.sample_tokens:
        return []
    field = f"sample_prompt={config.sample_prompt!r}"
    try:
        ids = data.tokenizer.encode(config.sample_prompt)
    except TokenizerError as error:
        raise TrainingError(f"{field}: {error}; or print no samples, with --sample-tokens 0") from error
    positions = config.model.n_positions
    if not 0 < len(ids) < positions:
        raise TrainingError(
            f"{field}: has {len(ids)} tokens; give at least one, and fewer than n_positions={positions}"
        )
    return ids


def sample(config: TrainConfig, model: GPT2, state: TrainState, data: Data, prompt: list[int]) -> str:
    """Return a sample of the model, drawn with the same seed at every evaluation."""
    assert data.tokenizer is not None  # there is a prompt
    new = generate(
        model.clone(lora=None),
        whole_params(model, weights(state), state.frozen),
        jnp.asarray([prompt]),
        max_new_tokens=min(config.sample_tokens, config.model.n_positions - len(prompt)),
        temperature=SAMPLE_TEMPERATURE,
        seed=config.seed,
    )
    return printable(data.tokenizer.decode(new[0].tolist()))


def weights(state: TrainState) -> Any:
    """Return the trained weights that are evaluated, sampled from and exported."""
    return state.params if state.ema_params is None else state.ema_params

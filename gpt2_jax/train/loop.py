"""A training run, from data to export."""

from __future__ import annotations

import dataclasses
import math
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

import bridge
from bridge import Checkpoint, TokenizerError
from bridge.formats.run import best_step
from bridge.formats.run import validation_loss as stored_loss
from gpt2_jax.data import Data, evaluation_batches, training_batches
from gpt2_jax.generate import generate
from gpt2_jax.model import GPT2
from gpt2_jax.pretrained import model_from_checkpoint
from gpt2_jax.train import run as runs
from gpt2_jax.train.checkpoint import Checkpoints
from gpt2_jax.train.config import NonFiniteLoss, TrainConfig, TrainingError
from gpt2_jax.train.metrics import plot_losses
from gpt2_jax.train.optimizer import learning_rate_schedule, make_optimizer
from gpt2_jax.train.report import Report
from gpt2_jax.train.signals import StopSignals
from gpt2_jax.train.step import TrainState, all_finite, init_state, make_eval_step, make_train_step

SAMPLE_TEMPERATURE = 0.8


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run: Path
    step: int
    """Updates made in all."""
    best_step: int
    """Of the checkpoint that the run is read as, and that was exported."""
    best_val_loss: float | None
    """Its validation loss, nats per token."""
    stopped_by: signal.Signals | None
    """The signal that ended the run before its last step."""
    export: Path
    plot: Path

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        paths = {name: str(values[name]) for name in ("run", "export", "plot")}
        return {**values, **paths, "stopped_by": self.stopped_by and self.stopped_by.name}


def train(
    config: TrainConfig,
    run: Path,
    data: Data,
    *,
    init_from: Checkpoint | None = None,
    resume: bool = False,
    accept_changes: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Train, evaluate, keep checkpoints, and export; everything is written below the directory `run`.

    Args:
        config: the whole recipe; its model's vocabulary must be the data's.
        data: from `gpt2_jax.data.open_data`.
        init_from: begin with these weights instead of random ones.
        resume: go on from the newest checkpoint in `run`, if there is one.
        accept_changes: resume although the configuration or the data are not what they were.
        console: where to print; None is standard output.

    Raises `TrainingError` for what cannot be trained or resumed, and `NonFiniteLoss`, its child, naming the
    step, where the loss is no longer finite; the checkpoints saved before then stay.
    """
    console = console or Console()
    prompt = encoded_prompt(config, data)
    resumes = resume and runs.is_run(run)
    if resumes:
        runs.require_same(run, config, data, accept_changes)
    else:
        runs.begin(run, config, data)
    model = make_model(config)
    tx = make_optimizer(config.optimizer, config.steps)
    train_step = make_train_step(
        model,
        tx,
        seed=config.seed,
        accumulate=config.accumulate,
        clip_norm=config.optimizer.clip_norm,
        ema_decay=config.ema_decay,
    )
    evaluate = partial(validation_loss, make_eval_step(model), config, data)
    schedule = learning_rate_schedule(config.optimizer, config.steps)
    with StopSignals() as stop, Checkpoints(run, config.keep_last) as checkpoints:
        state = first_state(config, model, tx, init_from)
        if resumes and (saved := checkpoints.latest()) is not None:
            state = checkpoints.restore(saved, state)
        if resumes:  # now that the state fits the configuration
            runs.describe(run, config, data)
        start = int(state.step)
        batches = training_batches(
            data.train,
            batch_size=config.batch_size,
            length=config.length,
            seed=config.seed,
            start_step=start,
            examples=config.examples,
        )
        with Report(console, run, config, start, schedule) as report:
            if start == 0:
                report.write(0, {"val_loss": evaluate(state)})
            best = lowest_loss(run)
            for step in range(start + 1, config.steps + 1):
                state, metrics = train_step(state, next(batches))
                report.stepped(step, metrics)
                ends = step == config.steps or stop.received is not None
                logs, evaluates = step % config.log_every == 0, step % config.eval_every == 0 or step == config.steps
                saves = ends or step % config.checkpoint_every == 0
                if logs or evaluates or saves:
                    record = report.fetch()
                    with report.not_training("evaluating" if evaluates else "saving"):
                        if evaluates:
                            record["val_loss"] = loss = evaluate(state)
                            saves, best = saves or loss < best, min(loss, best)
                        if logs or evaluates:  # before it is saved: a resumed run keeps the lines up to its checkpoint
                            report.write(step, record)
                        if saves:
                            require_finite(state)
                            checkpoints.save(state, record.get("val_loss"))
                        if evaluates and prompt:
                            report.say(sample(config, model, state, data, prompt))
                if ends:
                    break
    return finish(run, int(state.step), stop.received if state.step < config.steps else None)


def settle(config: TrainConfig, data: Data, init_from: Checkpoint | None = None) -> TrainConfig:
    """The configuration with the model that it comes to: the checkpoint's sizes, or the tokenizer's vocabulary.

    Dropout is a matter of training, and stays as it was configured.
    """
    model = config.model
    if init_from is not None:
        rates = {name: getattr(model, name) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
        model = replace(init_from.config, **rates)
    elif data.tokenizer is not None:
        model = replace(model, vocab_size=data.tokenizer.max_token_value + 1)
    if config.length > model.n_positions:
        raise TrainingError(f"length={config.length}: the model has n_positions={model.n_positions}")
    return replace(config, model=model)


def make_model(config: TrainConfig) -> GPT2:
    """The model in the form that it trains in."""
    return GPT2(
        config.model,
        dtype=jnp.dtype(config.dtype),
        scan=config.scan,
        vocab_multiple=config.vocab_multiple,
        remat=config.remat,
    )


def first_state(
    config: TrainConfig, model: GPT2, tx: optax.GradientTransformation, init_from: Checkpoint | None
) -> TrainState:
    """Before the first step: weights from a checkpoint, or random ones drawn from the seed."""
    if init_from is None:
        ids = jnp.zeros((1, config.length), jnp.int32)
        params = jax.jit(model.init)(jax.random.key(config.seed), ids)["params"]
    else:
        params = model_from_checkpoint(
            init_from, param_dtype=jnp.float32, scan=config.scan, vocab_multiple=config.vocab_multiple
        )[1]
    return init_state(params, tx, ema=config.ema_decay is not None)


def validation_loss(eval_step: Callable[..., Any], config: TrainConfig, data: Data, state: TrainState) -> float:
    """Mean loss in nats per token over the validation data, of the running mean of the weights where one is kept.

    Raises `NonFiniteLoss`.
    """
    assert data.validation is not None  # open_data gives one for any fraction above 0
    batches = evaluation_batches(
        data.validation,
        batch_size=config.batch_size,
        length=config.length,
        most_batches=config.eval_batches,
        examples=config.examples,
    )
    sums = [eval_step(weights(state), batch) for batch in batches]
    mean = sum(float(loss) for loss, _ in sums) / sum(int(count) for _, count in sums)
    if not math.isfinite(mean):
        raise NonFiniteLoss(f"step {state.step}: validation loss {mean}")
    return mean


def require_finite(state: TrainState) -> None:
    """A step with a finite loss can still leave weights that have none; they are no checkpoint."""
    if not all_finite(state.params):
        raise NonFiniteLoss(f"step {state.step}: its update made weights infinite or NaN")


def encoded_prompt(config: TrainConfig, data: Data) -> list[int]:
    """What samples go on from; empty where none are printed."""
    if data.tokenizer is None or not config.sample_tokens:
        return []
    named = f"sample_prompt={config.sample_prompt!r}"
    try:
        ids = data.tokenizer.encode_ordinary(config.sample_prompt)
    except TokenizerError as error:
        raise TrainingError(f"{named}: {error}; or print no samples, with --sample-tokens 0") from error
    if not 0 < len(ids) < (most := config.model.n_positions):
        raise TrainingError(f"{named}: has {len(ids)} tokens; give at least one, and fewer than n_positions={most}")
    return ids


def sample(config: TrainConfig, model: GPT2, state: TrainState, data: Data, prompt: list[int]) -> str:
    """What the model writes, drawn with the same seed at every evaluation."""
    assert data.tokenizer is not None  # there is a prompt
    new = generate(
        model,
        weights(state),
        jnp.asarray([prompt]),
        max_new_tokens=min(config.sample_tokens, config.model.n_positions - len(prompt)),
        temperature=SAMPLE_TEMPERATURE,
        seed=config.seed,
    )
    # A padded vocabulary has ids that are no tokens.
    return data.tokenizer.decode([i for i in new[0].tolist() if i <= data.tokenizer.max_token_value])


def weights(state: TrainState) -> Any:
    """What is evaluated, sampled from and exported."""
    return state.params if state.ema_params is None else state.ema_params


def lowest_loss(run: Path) -> float:
    """Of the checkpoints that the run has."""
    step = best_step(run)
    loss = None if step is None else stored_loss(run, step)
    return float("inf") if loss is None else loss


def finish(run: Path, step: int, stopped_by: signal.Signals | None) -> Outcome:
    """Draw the losses and export the best checkpoint."""
    best = best_step(run)
    assert best is not None  # one is saved when the loop ends
    bridge.save(bridge.load(run).with_biases(), run / runs.EXPORT, format="huggingface", overwrite=True)
    return Outcome(run, step, best, stored_loss(run, best), stopped_by, run / runs.EXPORT, plot_losses(run))

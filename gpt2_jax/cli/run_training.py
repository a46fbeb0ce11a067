"""Open the data and the initial checkpoint of a training run, train, and print the result."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from jax.errors import JaxRuntimeError
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

import bridge
from bridge import BridgeError, Checkpoint
from bridge.formats.trainers.run import steps
from gpt2_jax.cli.examples import shown_examples
from gpt2_jax.cli.init_from import chosen_tokenizer, require_rows, require_sizes, sizes_asked_for
from gpt2_jax.console.output import json_writer, progress
from gpt2_jax.console.terminal import Console, console, print_error
from gpt2_jax.data import Data, RecordOptions, open_data, training_batches
from gpt2_jax.data.text.special_tokens import policy_of
from gpt2_jax.parallel.distributed import broadcast_from_first, end, end_now, first_alone, is_first, leave
from gpt2_jax.training import NonFiniteLoss, Outcome, TrainConfig, resolve_config, train
from gpt2_jax.training.config import validation_sets
from gpt2_jax.training.errors import is_out_of_memory
from gpt2_jax.training.preemption import PreemptionHandler
from gpt2_jax.training.run.directory import require_available
from gpt2_jax.training.run.identity import has_run_json, stored_identity
from gpt2_jax.training.run.metrics import require_packages
from gpt2_jax.training.state import examples_of

DIVERGED = 1
"""The exit code of a run that stopped because of a loss or gradient that is not finite."""


def train_and_report(
    config: TrainConfig,
    out: Path,
    *,
    default: TrainConfig,
    resume: bool,
    accept_changes: bool,
    cache: Path | None,
    json: Path | None,
    overwrite: bool,
) -> int:
    """Train with the flags of `gpt2 train`, write the report, and return the exit code.

    With several processes, only the first one writes the report. If a signal stopped the run, this function ends the
    process.
    """
    inputs = (config.data, *validation_sets(config.validation_data).values(), config.init_from, config.base)
    write_json = json_writer(json if is_first() else None, overwrite, inputs)
    try:
        outcome = run_training(config, out, default=default, resume=resume, accept_changes=accept_changes, cache=cache)
    except NonFiniteLoss as error:
        why = f"{error}; earlier checkpoints are in {out}. Lower --learning-rate, or raise --warmup-steps"
        if is_first():
            print_error(why)
        end(DIVERGED, why)
    except (MemoryError, JaxRuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise BridgeError(
            f"out of memory with {config.batch_size} sequences per step in {config.num_microbatches} microbatches; "
            "lower --batch-size, or raise --num-microbatches"
        ) from error
    write_json(outcome.to_json())
    leave()
    if outcome.stopped_by is not None:  # without waiting for a compilation in progress
        end_now(128 + outcome.stopped_by)  # as shells report a signal
    return 0


def run_training(
    config: TrainConfig,
    out: Path,
    *,
    default: TrainConfig | None = None,
    resume: bool = False,
    accept_changes: bool = False,
    cache: Path | None = None,
) -> Outcome:
    """Open the data and the initial checkpoint, train, and print the result.

    `default`: the defaults of the flags. Sizes in `config` that differ from it were given as flags; it is an error if
    the run has other sizes.
    """
    screen = console() if is_first() else Console(quiet=True)
    say = screen.print
    if is_first():  # before text is tokenised, which may take long
        require_packages(config)
        require_available(out, resume=resume)
    resumes = broadcast_from_first(resume and has_run_json(out))
    if resume and not resumes:
        say(f"no run at {out}; starting a new one", soft_wrap=True)
    # A resumed run has its tokenizer and its sizes in RUN, and no longer needs the initial checkpoint.
    continues = broadcast_from_first(resumes and bool(steps(out)))
    source = bridge.load(out) if continues else _initial_checkpoint(config)
    if source is not None and not continues:
        for warning in source.diagnostics:
            say(f"warning: {warning}", soft_wrap=True)
    init_from = None if config.init_from is None else source
    asked = sizes_asked_for(config, default)
    if init_from is not None:
        require_sizes(asked, init_from.config, "--init-from sets")
    with first_alone("opening the data"):  # the first process tokenises text for all processes
        tokenizer = chosen_tokenizer(config, source, stored_identity(out) if resumes else None)
        data = _open_data(config, tokenizer, source, cache)
    config = resolve_config(config, data, init_from)
    if config.tokenizer != "bpe":  # BPE may have fewer tokens if the text is short
        require_sizes({k: v for k, v in asked.items() if k == "vocab_size"}, config.model, "the tokenizer sets")
    warmup = config.optimizer.warmup_steps
    if warmup >= config.max_steps:
        say(f"warning: --warmup-steps {warmup} is not below --max-steps, so the learning rate stays below its maximum")
    say(data.description, soft_wrap=True)
    say(f"{bridge.num_parameters(config.model):,} parameters, {config.batch_size * config.seq_len:,} tokens a step")
    outcome = train(
        config,
        out,
        data,
        init_from=init_from,
        resume=resume,
        accept_changes=accept_changes,
        console=screen,
        preemption=PreemptionHandler(second=signal.SIG_DFL),
    )
    best = "" if outcome.best_val_loss is None else f", validation loss {outcome.best_val_loss:.4f}"
    say(f"exported the best step, {outcome.best_step}{best}: {outcome.export}", soft_wrap=True)
    if outcome.adapter is not None:
        say(f"the adapter alone, for PEFT: {outcome.adapter}", soft_wrap=True)
    say(f"losses: {out / 'metrics.jsonl'}, {outcome.plot}", soft_wrap=True)
    if outcome.stopped_by is not None:
        say(f"stopped by {outcome.stopped_by.name} and saved at step {outcome.step}; continue with --resume")
    return outcome


def preview(config: TrainConfig, out: Path, number: int, *, resume: bool, cache: Path | None) -> None:
    """Print the first training examples, and what counts in the loss. Nothing is trained, and no run is created."""
    if number < 1:
        raise BridgeError(f"--show-examples {number}: must be at least 1")
    resumes = resume and has_run_json(out)
    source = bridge.load(out) if resumes and steps(out) else _initial_checkpoint(config)
    tokenizer = chosen_tokenizer(config, source, stored_identity(out) if resumes else None)
    data = _open_data(config, tokenizer, source, cache)
    config = resolve_config(config, data, None if config.init_from is None else source)
    screen = console()
    screen.print(data.description, soft_wrap=True)
    batches = training_batches(
        data.train,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        seed=config.seed,
        examples=examples_of(config, data),
    )
    for example in shown_examples(batches, number, data.tokenizer):
        screen.print(example, soft_wrap=True)


def _initial_checkpoint(config: TrainConfig) -> Checkpoint | None:
    if config.init_from is None:
        return None
    return bridge.load(
        config.init_from,
        activation=config.source_activation,
        drop_extra_heads=config.drop_extra_heads,
        base=config.base,
    )


def _open_data(config: TrainConfig, tokenizer: Any, source: Checkpoint | None, cache: Path | None) -> Data:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with progress(*columns) if is_first() else Progress(disable=True) as bar:
        task = bar.add_task("reading", total=None)
        data = open_data(
            config.data,
            tokenizer=tokenizer,
            special_tokens=policy_of(config.special_tokens),
            vocab_size=config.model.vocab_size if source is None else source.config.vocab_size,
            validation=validation_sets(config.validation_data),
            validation_fraction=config.validation_fraction,
            records=RecordOptions(
                text_field=config.text_field,
                prompt_field=config.prompt_field,
                completion_field=config.completion_field,
                messages_field=config.messages_field,
                skip_bad=config.skip_bad_records,
                # A padded row holds seq_len tokens, and the label of the last one.
                max_tokens={"stream": None, "packed": config.seq_len}.get(config.examples, config.seq_len + 1),
            ),
            cache=cache,
            progress=lambda doing, done, total: bar.update(task, description=doing, completed=done, total=total),
        )
    if source is not None and data.tokenizer is not None:
        require_rows(data.tokenizer, source)
    return data

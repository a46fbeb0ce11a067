"""A training run, from data to export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
import rich.console
from jax.sharding import Mesh

from bridge import Checkpoint
from bridge.errors import quoted
from bridge.formats.trainers.run import CHECKPOINTS, steps
from bridge.formats.trainers.run_base import BASE, base_digest, read_base
from bridge.storage import manifest
from gpt2_jax.console.terminal import Console
from gpt2_jax.data import Batch, Data, training_batches
from gpt2_jax.model import GPT2
from gpt2_jax.parallel.distributed import broadcast_from_first, is_first, require_agreement, wait_for_all
from gpt2_jax.parallel.sharding import make_mesh
from gpt2_jax.training.batch_placement import Rows, batch_rows
from gpt2_jax.training.config import TrainConfig
from gpt2_jax.training.determinism import require_deterministic
from gpt2_jax.training.errors import NonFiniteLoss, TrainingError
from gpt2_jax.training.evaluation import encoded_prompt, require_validation, sample, validation_loss
from gpt2_jax.training.optimizer import learning_rate_schedule, make_optimizer
from gpt2_jax.training.partial import num_values, trained_fraction
from gpt2_jax.training.preemption import Preempted, PreemptionHandler
from gpt2_jax.training.run import directory
from gpt2_jax.training.run.checkpointing import Checkpoints
from gpt2_jax.training.run.identity import description, has_run_json, run_arguments
from gpt2_jax.training.run.metrics import VALIDATION_CHANGED, require_packages
from gpt2_jax.training.run.outcome import Outcome, finish
from gpt2_jax.training.run.report import Report
from gpt2_jax.training.state import (
    TrainState,
    abstract_state,
    examples_of,
    frozen_params,
    initial_state,
    make_model,
    require_finite,
)
from gpt2_jax.training.step import make_eval_step, make_train_step


def train(
    config: TrainConfig,
    run: Path,
    data: Data,
    *,
    init_from: Checkpoint | None = None,
    resume: bool = False,
    accept_changes: bool = False,
    console: rich.console.Console | None = None,
    preemption: PreemptionHandler | None = None,
) -> Outcome:
    """Train, evaluate, save checkpoints, and export. All files are written below the directory `run`.

    Args:
        config: the configuration. The vocabulary of its model must be that of the data (see `resolve_config`).
        data: from `gpt2_jax.data.open_data`.
        init_from: start from these weights instead of random ones.
        resume: continue from the newest checkpoint in `run`, if there is one.
        accept_changes: resume although the configuration or the data changed.
        console: where to print; None is standard output.
        preemption: the signal handler. By default, a second signal runs the handler that was installed before.

    Raises:
        TrainingError: the run cannot be trained or resumed.
        NonFiniteLoss: the loss is NaN or infinite; the message names the step. Earlier checkpoints stay. A subclass of
            `TrainingError`.
    """
    setup = Setup.of(config, data)  # first, so that an invalid configuration creates no run
    is_resumed, is_new = _prepare_directory(run, config, data, init_from, resume, accept_changes)
    about = description(config, data)
    if config.is_partial:
        about["base"] = broadcast_from_first(base_digest(run) if is_first() else None)
    console = console or Console(quiet=not is_first())
    say = partial(console.print, soft_wrap=True)
    with directory.locked(run) if is_first() else nullcontext(), preemption or PreemptionHandler() as preemption:
        with jax.set_mesh(setup.mesh), Checkpoints(run, config.keep_last, about, say) as checkpoints:
            if is_new:
                if is_first():
                    directory.require_created_by(run, config, data)
                state = initial_state(config, setup.model, setup.tx, init_from, setup.mesh)
            else:
                state = _restored_state(setup, run, checkpoints, about)
            if is_resumed and is_first():  # only after the stored state was found to fit the configuration
                directory.write_description(run, config, data, init_from)
            schedule = learning_rate_schedule(config.optimizer, config.max_steps)
            trained = trained_fraction(state.params, state.frozen)
            if config.is_partial:
                say(f"training {num_values(state.params):,} values; {num_values(state.frozen):,} are frozen")
            with Report(console, run, config, int(state.step), schedule, setup.mesh.size, trained) as report:
                loop = Loop(setup, state, checkpoints, report, preemption)
                loop.run()
        return finish(run, about, int(loop.state.step), None if loop.is_complete else preemption.received, say)


@dataclass(frozen=True)
class Setup:
    """The parts of a run that do not change while it is trained."""

    config: TrainConfig
    data: Data
    model: GPT2
    tx: optax.GradientTransformation
    mesh: Mesh
    rows: Rows
    """The placement of a batch on the mesh."""
    abstract_state: TrainState
    """Shapes, dtypes and shardings of the state."""
    prompt: list[int]
    """The token ids of the sample prompt, empty if no samples are printed."""

    @classmethod
    def of(cls, config: TrainConfig, data: Data) -> Setup:
        """Raises `TrainingError` or `MeshError` if the configuration does not fit the data or these devices."""
        if config.deterministic:
            require_deterministic()
        require_validation(data)
        if is_first():
            require_packages(config)
        prompt = encoded_prompt(config, data)
        model, tx = make_model(config), make_optimizer(config.optimizer, config.max_steps, config.model.n_layer)
        mesh = make_mesh(config.mesh)
        state = abstract_state(config, model, tx, mesh)
        return cls(config, data, model, tx, mesh, batch_rows(config, mesh), state, prompt)


def _prepare_directory(
    run: Path, config: TrainConfig, data: Data, init_from: Checkpoint | None, resume: bool, accept_changes: bool
) -> tuple[bool, bool]:
    """Create the run's directory, or check that it belongs to this run.

    Returns whether an existing run is resumed, and whether training starts at step 0.
    """
    require_agreement({**run_arguments(config, data), "resume": resume, "accept_changes": accept_changes})
    is_resumed = broadcast_from_first(resume and has_run_json(run))
    if is_resumed:
        directory.require_run(run)
        if not accept_changes:
            directory.require_unchanged(run, config, data)
    # Without a checkpoint, there is nothing to resume, so the tokenizer of the run may differ.
    is_new = broadcast_from_first(not (is_resumed and bool(steps(run))))
    if is_new and config.is_partial:
        directory.require_base(init_from)
    if is_first():
        directory.require_replaceable_export(run)
        if is_new:
            directory.create(run, config, data, init_from=init_from, resume=resume)
    wait_for_all("the run's directory")
    directory.wait_until_visible(run)
    return is_resumed, is_new


def _restored_state(setup: Setup, run: Path, checkpoints: Checkpoints, about: Mapping[str, Any]) -> TrainState:
    """Return the state of the newest valid checkpoint. `about` has the digest of the run's base, if it has one."""
    newest = checkpoints.latest()
    if newest is None:
        raise TrainingError(f"none of the checkpoints in {quoted(run)} is valid; start again with another --out")
    directory.require_steps_left(run, setup.config, newest)
    state = checkpoints.restore(newest, setup.abstract_state._replace(frozen=None))
    if not setup.config.is_partial:
        return state
    if manifest.about(run / CHECKPOINTS / str(newest)).get("base") != about["base"]:
        raise TrainingError(f"{quoted(run / BASE)} is not the base of this run; restore it, or start again")
    base = Checkpoint(setup.config.model, read_base(run, setup.config.model), "memory")
    return state._replace(frozen=frozen_params(setup.config, setup.model, base, setup.mesh))


class Loop:
    """The training loop: steps, and between them records, evaluations, checkpoints and samples."""

    def __init__(
        self,
        setup: Setup,
        state: TrainState,
        checkpoints: Checkpoints,
        report: Report,
        preemption: PreemptionHandler,
    ) -> None:
        config = setup.config
        self.setup, self.config, self.state = setup, config, state
        self.checkpoints, self.report, self.preemption = checkpoints, report, preemption
        self.val_loss = None if checkpoints.newest is None else checkpoints.loss(checkpoints.newest)
        """The validation loss of `state`, if it was evaluated."""
        start = checkpoints.newest or 0
        self.has_other_validation = start > 0 and checkpoints.has_other_validation(start)
        """Whether the run is resumed with other validation data."""
        self.best = checkpoints.lowest_loss()
        self.losses = [] if self.has_other_validation else report.validation_losses()
        """The loss of every evaluation on this validation data so far."""
        self.eval_step = preemption.interruptible(make_eval_step(setup.model), setup.mesh)
        train_step = make_train_step(
            setup.model,
            setup.tx,
            seed=config.seed,
            num_microbatches=config.num_microbatches,
            max_grad_norm=config.optimizer.max_grad_norm,
            ema_decay=config.ema_decay,
            skip_non_finite=config.non_finite == "skip",
        )
        self.train_step = preemption.interruptible(train_step, setup.mesh)

    def run(self) -> None:
        """Train to the last step or until a signal, then save the state."""
        try:
            self.train()
        except Preempted:
            self.report.require_finite()
            if self.checkpoints.newest != int(self.state.step):
                self.save()

    def train(self) -> None:
        start, put = int(self.state.step), self.setup.rows.put
        self.preemption.check()
        self.initial_evaluation(start)
        if self.stops_early:
            return
        batches = self.batches(start)
        previous = None
        for step in range(start + 1, self.config.max_steps + 1):
            self.state, metrics = self.train_step(self.state, put(next(batches)))
            # Stay at most one step ahead of the device, so that a signal is handled promptly.
            jax.block_until_ready(previous)
            previous, self.val_loss = metrics, None
            self.report.stepped(step, metrics)
            self.checkpoints.check()
            self.after_step(step)
            if self.stops_early:
                return

    def batches(self, start_step: int) -> Iterator[Batch]:
        c = self.config
        return training_batches(
            self.setup.data.train,
            batch_size=c.batch_size,
            seq_len=c.seq_len,
            seed=c.seed,
            start_step=start_step,
            examples=examples_of(c, self.setup.data),
            rows=self.setup.rows.own,
        )

    def initial_evaluation(self, start: int) -> None:
        """Evaluate before the first step, and on a resume if the evaluation was interrupted or its data changed."""
        missed = start > 0 and self.val_loss is None and (self.is_evaluated(start) or self.has_other_validation)
        if start == 0 or missed:
            try:
                loss = self.validate()
            except NonFiniteLoss as error:
                if missed:
                    raise NonFiniteLoss(
                        f"{error}; remove {CHECKPOINTS}/{start} to continue from an earlier checkpoint"
                    ) from error
                raise
            record = {"val_loss": loss, **self.validate_sets(loss)}
            self.report.write(start, {**record, VALIDATION_CHANGED: 1} if self.has_other_validation else record)
            self.losses.append(loss)
            if missed:
                self.report.flush()  # first, because the mark of other validation data is not written again
                self.checkpoints.add_loss(start, loss)
                self.val_loss, self.best = loss, min(loss, self.best)

    def after_step(self, step: int) -> None:
        """Log, evaluate, save and sample if due after `step`.

        Signals are handled where little work is lost: before each batch of an evaluation, and after saving.
        """
        c, setup = self.config, self.setup
        logs, evaluates = step % c.log_every == 0, self.is_evaluated(step)
        saves = step % c.checkpoint_every == 0 or step == c.max_steps
        if logs or evaluates or saves:
            record = self.report.fetch()
            with self.report.not_training("evaluating" if evaluates else "saving"):
                if evaluates:
                    with suppress(Preempted):
                        loss = self.validate()
                        record.update({"val_loss": loss, **self.validate_sets(loss)})
                        self.val_loss = loss  # only now: a resume repeats an evaluation without all of its sets
                        saves, self.best = saves or loss < self.best, min(loss, self.best)
                        self.losses.append(loss)
                        saves = saves or self.stops_early
                if logs or evaluates:  # before saving: a resumed run keeps the records up to its checkpoint
                    self.report.write(step, record)
                if saves:
                    self.save()
                if evaluates and self.setup.prompt:
                    self.preemption.check()
                    text = sample(c, setup.model, self.state, setup.data, setup.prompt)
                    self.report.say(f"sample after step {step}:\n{text}\n")
        self.preemption.check()

    @property
    def is_complete(self) -> bool:
        at_end = self.stops_early or int(self.state.step) >= self.config.max_steps
        return at_end and self.val_loss is not None

    @property
    def stops_early(self) -> bool:
        """Whether the last `early_stopping` evaluations gave no new lowest loss."""
        patience, losses = self.config.early_stopping, self.losses
        return patience is not None and bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= patience

    def is_evaluated(self, step: int) -> bool:
        return step % self.config.eval_every == 0 or step == self.config.max_steps

    def validate(self) -> float:
        return self._validation_loss(self.setup.data)

    def validate_sets(self, first_loss: float) -> dict[str, float | None]:
        """Return the loss of each named validation set, given that of the first one."""
        data = self.setup.data
        losses: dict[str, float | None] = {}
        for name, stream in data.validation_sets.items():
            is_first_set = stream is data.validation
            loss = first_loss if is_first_set else self._validation_loss(replace(data, validation=stream))
            losses[f"val_loss/{name}"] = loss
        return losses

    def _validation_loss(self, data: Data) -> float:
        return validation_loss(self.eval_step, self.config, data, self.state, self.setup.mesh, self.preemption.check)

    def save(self) -> None:
        if int(self.state.step) > 0:  # at step 0, there is no update to check
            require_finite(self.state)
        self.report.flush()  # even after a system crash, no checkpoint may be newer than the log
        self.checkpoints.save(self.state._replace(frozen=None), self.val_loss)

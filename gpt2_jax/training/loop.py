"""A training run, from data to export."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
import rich.console
from jax.sharding import Mesh

import bridge
from bridge import Checkpoint
from bridge.errors import quoted
from bridge.formats.run import CHECKPOINTS, best_valid_step, steps
from bridge.formats.run import validation_loss as stored_loss
from bridge.storage import manifest
from bridge.storage.atomic_writes import new_directory
from gpt2_jax.console.report_files import is_report
from gpt2_jax.console.terminal import Console
from gpt2_jax.data import Data, training_batches
from gpt2_jax.model import GPT2
from gpt2_jax.parallel.distributed import broadcast_from_first, is_first, require_agreement, wait_for_all
from gpt2_jax.parallel.sharding import make_mesh
from gpt2_jax.training.batches import rows_of_step
from gpt2_jax.training.config import NonFiniteLoss, TrainConfig, TrainingError
from gpt2_jax.training.determinism import require_deterministic
from gpt2_jax.training.evaluation import encoded_prompt, require_finite, require_validation, sample, validation_loss
from gpt2_jax.training.optimizer import learning_rate_schedule, make_optimizer
from gpt2_jax.training.preemption import Preempted, PreemptionHandler
from gpt2_jax.training.run import directory as runs
from gpt2_jax.training.run.checkpointing import Checkpoints
from gpt2_jax.training.run.metrics import PLOT, plot_losses, require_packages
from gpt2_jax.training.run.report import Report
from gpt2_jax.training.state import described_state, first_state, make_model
from gpt2_jax.training.step import TrainState, make_eval_step, make_train_step


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run: Path
    step: int
    """Total number of updates."""
    best_step: int
    """Step of the checkpoint that was exported, and that loading the run reads."""
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
    console: rich.console.Console | None = None,
    stop: PreemptionHandler | None = None,
) -> Outcome:
    """Train, evaluate, save checkpoints, and export. All files are written below the directory `run`.

    Args:
        config: the configuration. The vocabulary of its model must be that of the data.
        data: from `gpt2_jax.data.open_data`.
        init_from: start from these weights instead of random ones.
        resume: continue from the newest checkpoint in `run`, if there is one.
        accept_changes: resume although the configuration or the data changed.
        console: where to print; None is standard output.
        stop: the signal handler. By default, a second signal has its previous effect.

    Raises:
        TrainingError: the run cannot be trained or resumed.
        NonFiniteLoss: the loss is NaN or infinite; the message names the step. Earlier checkpoints stay. A subclass of
            `TrainingError`.
    """
    if config.deterministic:
        require_deterministic()
    require_validation(data)
    if is_first():
        require_packages(config)
    prompt = encoded_prompt(config, data)
    model, tx, mesh = make_model(config), make_optimizer(config.optimizer, config.max_steps), make_mesh(config.mesh)
    place = described_state(config, model, tx, mesh)  # before a run is created that does not fit this mesh
    rows_of_step(config, mesh)
    resumes, begins = _enter(run, config, data, resume, accept_changes)
    console, about = console or Console(quiet=not is_first()), runs.about(config, data)
    say = partial(console.print, soft_wrap=True)
    with runs.locked(run) if is_first() else nullcontext(), stop or PreemptionHandler() as stop:
        with jax.set_mesh(mesh), Checkpoints(run, config.keep_last, about, say) as checkpoints:
            if begins and is_first():
                runs.require_own(run, config, data)
            saved = None if begins else checkpoints.latest()
            if saved is None and not begins:
                raise TrainingError(
                    f"none of the checkpoints in {quoted(run)} is valid; start again with another --out"
                )
            if saved is not None and saved > config.max_steps:
                raise TrainingError(
                    f"max_steps={config.max_steps}: the newest checkpoint in {quoted(run)} is already at step {saved}; "
                    f"give --max-steps {saved} or more, or start again with another --out"
                )
            state = (
                first_state(config, model, tx, init_from, mesh) if saved is None else checkpoints.restore(saved, place)
            )
            if resumes and is_first():  # now that the state fits the configuration
                runs.describe(run, config, data)
            schedule = learning_rate_schedule(config.optimizer, config.max_steps)
            with Report(console, run, config, int(state.step), schedule, mesh.size) as report:
                loop = Loop(config, data, model, tx, mesh, prompt, state, checkpoints, report, stop)
                loop.run()
        return finish(run, about, int(loop.state.step), None if loop.is_complete else stop.received, say)


def _enter(run: Path, config: TrainConfig, data: Data, resume: bool, accept_changes: bool) -> tuple[bool, bool]:
    """Create the run's directory, or check that it belongs to this run.

    Returns whether an existing run is resumed, and whether training starts at step 0.
    """
    require_agreement({**runs.told(config, data), "resume": resume, "accept_changes": accept_changes})
    resumes = broadcast_from_first(resume and runs.is_run(run))
    if resumes:
        runs.require_run(run)
        runs.require_same(run, config, data, accept_changes)
    # Without a checkpoint, there is nothing to resume, so its tokenizer may differ.
    begins = broadcast_from_first(not (resumes and bool(steps(run))))
    if is_first():
        runs.require_replaceable_export(run)
        if begins:
            runs.begin(run, config, data, resume=resume)
    wait_for_all("the run's directory")
    runs.wait_until_visible(run)
    return resumes, begins


class Loop:
    """The training loop: steps, and between them records, evaluations, checkpoints and samples."""

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        model: GPT2,
        tx: optax.GradientTransformation,
        mesh: Mesh,
        prompt: list[int],
        state: TrainState,
        checkpoints: Checkpoints,
        report: Report,
        stop: PreemptionHandler,
    ) -> None:
        self.config, self.data, self.model, self.mesh, self.prompt = config, data, model, mesh, prompt
        self.state, self.checkpoints, self.report, self.stop = state, checkpoints, report, stop
        self.val_loss = None if checkpoints.newest is None else checkpoints.loss(checkpoints.newest)
        """The validation loss of `state`, if it was evaluated."""
        self.best = checkpoints.lowest_loss()
        self.eval_step = stop.compiled_aside(make_eval_step(model), mesh)
        train_step = make_train_step(
            model,
            tx,
            seed=config.seed,
            num_microbatches=config.num_microbatches,
            max_grad_norm=config.optimizer.max_grad_norm,
            ema_decay=config.ema_decay,
            skip_non_finite=config.non_finite == "skip",
        )
        self.train_step = stop.compiled_aside(train_step, mesh)

    def run(self) -> None:
        """Train to the last step or until a signal, then save the state."""
        try:
            self.train()
        except Preempted:
            self.report.require_finite()
            if self.checkpoints.newest != int(self.state.step):
                self.save()

    def train(self) -> None:
        c, start, rows = self.config, int(self.state.step), rows_of_step(self.config, self.mesh)
        self.stop.check()
        self.initial_evaluation(start)
        batches = training_batches(
            self.data.train,
            batch_size=c.batch_size,
            seq_len=c.seq_len,
            seed=c.seed,
            start_step=start,
            examples=c.examples,
            rows=rows.own,
        )
        before = None
        for step in range(start + 1, c.max_steps + 1):
            self.state, metrics = self.train_step(self.state, rows.put(next(batches)))
            jax.block_until_ready(before)  # at most one step ahead of the device, so that a signal is handled promptly
            before, self.val_loss = metrics, None
            self.report.stepped(step, metrics)
            self.checkpoints.check()
            self.after_step(step)

    def initial_evaluation(self, start: int) -> None:
        """Evaluate before the first step, or repeat the evaluation that a signal interrupted before a resume."""
        missed = start > 0 and self.is_evaluated(start) and self.val_loss is None
        if start == 0 or missed:
            try:
                loss = self.validate()
            except NonFiniteLoss as error:
                if missed:
                    raise NonFiniteLoss(
                        f"{error}; remove {CHECKPOINTS}/{start} to continue from an earlier checkpoint"
                    ) from error
                raise
            if missed:
                self.checkpoints.add_loss(start, loss)
                self.val_loss, self.best = loss, min(loss, self.best)
            self.report.write(start, {"val_loss": loss})

    def after_step(self, step: int) -> None:
        """Log, evaluate, save and sample if due after `step`. Signals are handled where little work is lost: before
        each batch of an evaluation, and after saving."""
        c = self.config
        logs, evaluates = step % c.log_every == 0, self.is_evaluated(step)
        saves = step % c.checkpoint_every == 0 or step == c.max_steps
        if logs or evaluates or saves:
            record = self.report.fetch()
            with self.report.not_training("evaluating" if evaluates else "saving"):
                if evaluates:
                    with suppress(Preempted):
                        record["val_loss"] = self.val_loss = loss = self.validate()
                        saves, self.best = saves or loss < self.best, min(loss, self.best)
                if logs or evaluates:  # before saving: a resumed run keeps the records up to its checkpoint
                    self.report.write(step, record)
                if saves:
                    self.save()
                if evaluates and self.prompt:
                    self.stop.check()
                    self.report.say(sample(c, self.model, self.state, self.data, self.prompt))
        self.stop.check()

    @property
    def is_complete(self) -> bool:
        return int(self.state.step) >= self.config.max_steps and self.val_loss is not None

    def is_evaluated(self, step: int) -> bool:
        return step % self.config.eval_every == 0 or step == self.config.max_steps

    def validate(self) -> float:
        return validation_loss(self.eval_step, self.config, self.data, self.state, self.mesh, self.stop.check)

    def save(self) -> None:
        if int(self.state.step) > 0:  # before the first step, the weights are the initial ones
            require_finite(self.state)
        self.report.flush()  # even after a system crash, no checkpoint may be newer than the log
        self.checkpoints.save(self.state, self.val_loss)


def finish(
    run: Path,
    about: Mapping[str, Any],
    step: int,
    stopped_by: signal.Signals | None,
    say: Callable[[str], object] = lambda _: None,
) -> Outcome:
    """Plot the losses and export the best checkpoint, with a manifest that identifies the run.

    `say` gets a message about every damaged checkpoint that is skipped.
    """
    best, loss = 0, None
    if is_first():
        best = best_valid_step(run, say)
        loss = stored_loss(run, best)
        with new_directory(run / runs.EXPORT, replaceable=runs.exported(run)) as export:
            bridge.save(bridge.load(run / CHECKPOINTS / str(best)).with_biases(), export, format="huggingface")
            manifest.seal(export, {**about, "step": best, "val_loss": loss})
        if (run / PLOT).exists() and not is_report(run / PLOT):
            say(f"{quoted(run / PLOT)} was not drawn by this version of gpt2 train and is kept")
        else:
            plot_losses(run)
    best, loss = broadcast_from_first((best, loss))  # the other processes wait for it
    return Outcome(run, step, best, loss, stopped_by, run / runs.EXPORT, run / PLOT)

"""What is known about the run that trained a checkpoint: recipe, data, and losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.formats.trainers.run import CHECKPOINTS, is_run, validation_loss
from gpt2_jax.training.config import TrainConfig, flat
from gpt2_jax.training.run.directory import EXPORT
from gpt2_jax.training.run.identity import stored_identity
from gpt2_jax.training.run.metrics import read_metrics

RECIPE = (
    "preset",
    "optimizer",
    "learning_rate",
    "min_learning_rate",
    "schedule",
    "warmup_steps",
    "beta1",
    "beta2",
    "epsilon",
    "weight_decay",
    "max_grad_norm",
    "batch_size",
    "seq_len",
    "max_steps",
    "examples",
    "dtype",
    "ema_decay",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "seed",
)
"""The fields of the configuration that are published. Paths, prompts and names of projects are not among them."""
MUON = ("muon_learning_rate", "muon_momentum", "muon_weight_decay")
"""Fields that only Muon uses."""
MOST_POINTS = 10
"""The rows of the table of losses."""


@dataclass(frozen=True)
class RunFacts:
    """A run, and which of its checkpoints is shared."""

    config: TrainConfig
    data: str
    """Fingerprint of the training and validation tokens."""
    step: int
    val_loss: float | None
    """The validation loss of the checkpoint, nats per token."""
    losses: Sequence[Mapping[str, Any]]
    """Records of metrics.jsonl: `step`, and `train_loss` or `val_loss`."""

    @property
    def recipe(self) -> dict[str, Any]:
        """The published fields of the configuration. Fields without a value are left out."""
        values = flat(self.config)
        names = RECIPE + (MUON if self.config.optimizer.optimizer == "muon" else ())
        return {name: values[name] for name in names if values[name] is not None}

    @property
    def tokens_seen(self) -> int:
        """The tokens of all batches up to the checkpoint, padding included."""
        return self.step * self.config.batch_size * self.config.seq_len

    def points(self) -> list[Mapping[str, Any]]:
        """Return at most `MOST_POINTS` records, evenly spaced, among them the first and the last.

        They are records with a validation loss, if there are any.
        """
        found = [record for record in self.losses if "val_loss" in record]
        found = found or [record for record in self.losses if "train_loss" in record]
        if len(found) <= MOST_POINTS:
            return found
        return [found[round(k * (len(found) - 1) / (MOST_POINTS - 1))] for k in range(MOST_POINTS)]


def run_facts(source: Path, checkpoint: Path | None) -> RunFacts | None:
    """Return what is known about the run of a source, or None if the source does not belong to a run.

    Args:
        source: a run, one of its checkpoints, or its export.
        checkpoint: `Checkpoint.source`, the directory of the checkpoint that was read.

    Raises `TrainingError` if the run's files are damaged.
    """
    run = next((path for path in (source, source.parent, source.parent.parent) if is_run(path)), None)
    if run is None:
        return None
    step = _step(run, source, checkpoint)
    if step is None:
        return None
    identity = stored_identity(run)
    records = [record for record in read_metrics(run) if record["step"] <= step]
    return RunFacts(identity.config, identity.data, step, validation_loss(run, step), records)


def _step(run: Path, source: Path, checkpoint: Path | None) -> int | None:
    """Return the step of the checkpoint, or None for another directory inside the run."""
    if source == run / EXPORT:
        from bridge.storage import manifest

        step = manifest.verify(source).get("step")
        return step if type(step) is int else None
    if checkpoint is not None and checkpoint.parent == run / CHECKPOINTS and checkpoint.name.isdecimal():
        return int(checkpoint.name)
    return None

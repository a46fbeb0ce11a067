"""The facts about the run that trained a checkpoint: recipe, data, and losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bridge import Checkpoint
from bridge.errors import quoted
from bridge.formats.trainers.run import CHECKPOINTS, is_run, validation_loss
from bridge.storage import manifest
from gpt2_jax.sharing.errors import SharingError
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
    "early_stopping",
    "examples",
    "freeze",
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
LORA = ("lora_rank", "lora_alpha", "lora_targets", "lora_dropout", "lora_rslora")
"""Fields that only an adapter uses."""
DECAY = {"cosine": ("decay_steps",), "wsd": ("decay_fraction",)}
"""Schedule -> fields that only it uses."""
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
        """The published fields of the configuration. Fields without a value or an effect are left out."""
        values, optimizer = flat(self.config), self.config.optimizer
        names = RECIPE + (MUON if optimizer.optimizer == "muon" else ()) + (LORA if self.config.lora.rank else ())
        names += DECAY.get(optimizer.schedule, ())
        names += ("layer_decay",) if optimizer.layer_decay != 1 else ()
        return {name: values[name] for name in names if values[name] is not None}

    @property
    def tokens_seen(self) -> int:
        """The tokens of all batches up to the checkpoint, padding included."""
        return self.step * self.config.batch_size * self.config.seq_len

    def points(self) -> list[Mapping[str, Any]]:
        """Return at most `MOST_POINTS` records, evenly spaced, including the first and the last.

        If there are records with a validation loss, only these are returned.
        """
        found = [record for record in self.losses if "val_loss" in record]
        found = found or [record for record in self.losses if "train_loss" in record]
        if len(found) <= MOST_POINTS:
            return found
        return [found[round(k * (len(found) - 1) / (MOST_POINTS - 1))] for k in range(MOST_POINTS)]


def run_facts(checkpoint: Checkpoint) -> RunFacts | None:
    """Return the facts about the run of a checkpoint, or None if it was not read from a run or its export.

    Raises `BridgeError` if the run's files are damaged.
    """
    path, source = checkpoint.path, checkpoint.source
    step: Any
    if path is None or source is None:
        return None
    if source.parent.name == CHECKPOINTS and source.name.isdecimal() and is_run(path):
        run, step = path, int(source.name)
    elif path.name == EXPORT and is_run(path.parent):
        run, step = path.parent, manifest.verify(path).get("step")
        if type(step) is not int:
            raise SharingError(f"{quoted(path)}: its manifest has no step; export the run again")
    else:
        return None
    identity = stored_identity(run)
    records = [record for record in read_metrics(run) if record["step"] <= step]
    return RunFacts(identity.config, identity.data, step, validation_loss(run, step), records)

"""The comparison of AdamW's states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields

from bridge.checkpoint import Checkpoint
from bridge.comparison.settings import Difference
from bridge.comparison.tensors import Progress, TensorComparison, compare_entries
from bridge.formats.trainers import run
from bridge.optimizer_state import AdamWState, Hyperparameters
from bridge.storage.tensors import LazyTensor, LazyTensorMap


@dataclass(frozen=True)
class OptimizerComparison:
    """How two states of AdamW compare."""

    is_compared: bool
    """Whether both checkpoints have a state. A state on one side alone is not a difference."""
    missing: tuple[str, ...] = ()
    """The sides without a state, "A" or "B"."""
    differences: tuple[Difference, ...] = ()
    """The step and the hyperparameters that differ. A hyperparameter's name has the number of its parameters."""
    tensors: tuple[TensorComparison, ...] = ()
    """Both moments of every parameter, named `exp_avg of NAME` and `exp_avg_sq of NAME`."""

    @property
    def is_different(self) -> bool:
        return bool(self.differences) or any(tensor.status != "identical" for tensor in self.tensors)


def compare_optimizers(a: Checkpoint, b: Checkpoint, progress: Progress = lambda name: None) -> OptimizerComparison:
    """Compare the states of AdamW of two checkpoints, one pair of moments in memory at a time.

    Raises `CheckpointError` or `ConversionError` for a damaged state.
    """
    first, second = _adamw_state(a), _adamw_state(b)
    if first is None or second is None:
        missing = tuple(side for side, state in (("A", first), ("B", second)) if state is None)
        return OptimizerComparison(False, missing)
    steps = (Difference("step", first.step, second.step, "state"),) if first.step != second.step else ()
    moments = compare_entries(_moments(first), _moments(second), progress)
    return OptimizerComparison(True, (), (*steps, *_hyperparameters(first, second)), moments)


def _adamw_state(checkpoint: Checkpoint) -> AdamWState | None:
    if checkpoint.format == run.NAME and checkpoint.source is not None:
        return run.adamw_state(checkpoint.source, checkpoint.config)
    return checkpoint.optimizer


def _moments(state: AdamWState) -> dict[str, LazyTensor]:
    return {
        f"{moment} of {name}": entry
        for moment in ("exp_avg", "exp_avg_sq")
        for name, entry in LazyTensorMap.of(getattr(state, moment)).entries.items()
    }


def _hyperparameters(a: AdamWState, b: AdamWState) -> Iterator[Difference]:
    """Yield the hyperparameters that differ, one for each pair of values. States from optax have none."""
    shared = [name for name in a.hyperparameters if name in b.hyperparameters]
    for field in fields(Hyperparameters):
        values = [[getattr(side.hyperparameters[name], field.name) for name in shared] for side in (a, b)]
        pairs = Counter(zip(*values, strict=True))
        for (x, y), count in pairs.items():
            if x != y:
                yield Difference(f"{field.name} of {count} parameters", x, y, "state")

"""What `gpt2 train` leaves: `config.json`, the tokenizer, and numbered checkpoints that orbax wrote.

A run is read as its best checkpoint by validation loss, or its newest if none was evaluated; one of its
`checkpoints/STEP` directories is read as that one. Either is first held against its manifest, file by file; of a run,
what is damaged is passed over, and said to be. Where a running mean of the weights is kept (EMA), the mean
is what is read. Orbax stores arrays with tensorstore, which needs no JAX to read (`bridge.array_store`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bridge import manifest
from bridge.array_store import StoredArray, open_arrays
from bridge.arrays import TensorEntry, first_rows
from bridge.checkpoint import Checkpoint
from bridge.config import GPT2Config, harmless_fields
from bridge.convert import STACK
from bridge.errors import CheckpointError, bullet_list, quoted
from bridge.formats.directory import CONFIG, read_config, tensors_of_tree

NAME = "run"
RUN = "run.json"
CHECKPOINTS = "checkpoints"
_MOST_PADDING = 2**16
"""Rows by which a vocabulary may be padded, beside its own size."""
_NUMBER = re.compile(r"0|[1-9]\d*", re.ASCII)
WEIGHTS = ("ema_params", "params")
"""Where a saved state has the weights: the first of these that it holds."""


def find(path: Path) -> list[Path]:
    return [path] if _is_run(path) or _is_step(path) else []


def read(path: Path) -> Checkpoint:
    skipped: list[str] = []
    if _is_step(path):
        run, step = path.parent.parent, path
        verified(run, int(step.name))
    else:
        run, step = path, path / CHECKPOINTS / str(best_sound_step(path, skipped.append))
    config, fields = read_config(run / CONFIG)
    entries = {
        name: _without_padding(entry, config) if name in ("wte/embedding", "lm_head/embedding") else entry
        for name, entry in _unstacked(_weights(step / "state"), config).items()
    }
    tensors = tensors_of_tree(entries, config, step)
    return Checkpoint(
        config, tensors, NAME, run, harmless_fields(fields), (f"read from {CHECKPOINTS}/{step.name}", *skipped)
    )


def steps(run: Path) -> list[int]:
    """The steps of the checkpoints, in order. One gets its number once all of it is on the disk."""
    folder = run / CHECKPOINTS
    return sorted(int(p.name) for p in folder.iterdir() if _NUMBER.fullmatch(p.name)) if folder.is_dir() else []


def sealed_steps(run: Path) -> list[int]:
    """Of those, the ones whose manifest is as it was written; what it says of the files is not looked at."""
    return [step for step in steps(run) if _about(run, step) is not None]


def validation_loss(run: Path, step: int) -> float | None:
    """What was measured when this checkpoint was written, in nats per token; None if nothing was."""
    loss: Any = (_about(run, step) or {}).get("val_loss")
    is_number = type(loss) in (int, float) and abs(loss) <= sys.float_info.max  # which NaN is not
    return float(loss) if is_number else None


def best_step(run: Path) -> int | None:
    """The checkpoint with the lowest validation loss; the newest if none was evaluated."""
    return next(iter(_best_first(run)), None)


def verified(run: Path, step: int) -> dict[str, Any]:
    """What the manifest of a checkpoint says, every file being as it was written.

    Raises `CheckpointError` naming the first that is not, also where it is another step's.
    """
    path = run / CHECKPOINTS / str(step)
    about = manifest.verify(path)
    if not _is_of(about, step):
        raise CheckpointError(f"{quoted(path)} is the checkpoint of step {quoted(about.get('step'))}")
    return about


def sound(run: Path, candidates: Iterable[int], say: Callable[[str], object]) -> int | None:
    """The first of these checkpoints that is as it was written; `say` is told of those before it, which are not."""
    for step in candidates:
        try:
            verified(run, step)
            return step
        except CheckpointError as error:
            say(f"the checkpoint of step {step} is damaged and passed over: {error}")
    return None


def best_sound_step(run: Path, say: Callable[[str], object]) -> int:
    """As `best_step`, of those that are as they were written; `say` is told of each that would or could have been
    better: of one without a sound manifest the loss is not known.

    Raises `CheckpointError` where there is none.
    """
    damaged: list[str] = []
    best = _best_first(run)
    step = sound(run, [*(step for step in reversed(steps(run)) if step not in best), *best], damaged.append)
    if step is None and damaged:
        raise CheckpointError(f"the run {quoted(run)} has no checkpoint that is sound:\n{bullet_list(damaged)}")
    if step is None:
        raise CheckpointError(f"the run {quoted(run)} has no checkpoint yet; let it train until its first one")
    for line in damaged:
        say(line)
    return step


def _best_first(run: Path) -> list[int]:
    losses = {step: validation_loss(run, step) for step in sealed_steps(run)}
    evaluated = {step: loss for step, loss in losses.items() if loss is not None}
    return sorted(evaluated, key=lambda step: evaluated[step]) + sorted({*losses} - {*evaluated}, reverse=True)


def _about(run: Path, step: int) -> dict[str, Any] | None:
    try:
        about = manifest.about(run / CHECKPOINTS / str(step))
    except CheckpointError:
        return None
    return about if _is_of(about, step) else None


def _is_of(about: Mapping[str, Any], step: int) -> bool:
    return type(about.get("step")) is int and about["step"] == step


def _is_run(path: Path) -> bool:
    return (path / RUN).is_file() and (path / CONFIG).is_file()


def _is_step(path: Path) -> bool:
    return bool(_NUMBER.fullmatch(path.name)) and path.parent.name == CHECKPOINTS and _is_run(path.parent.parent)


def _weights(state: Path) -> dict[str, StoredArray]:
    """The saved weights by their path in the Flax tree, none of them read."""
    arrays = open_arrays(state)
    prefix = next((f"{part}." for part in WEIGHTS if any(name.startswith(f"{part}.") for name in arrays)), None)
    if prefix is None:
        raise CheckpointError(f"{quoted(state)} holds no weights; use another checkpoint of the run")
    return {
        name.removeprefix(prefix).replace(".", "/"): array for name, array in arrays.items() if name.startswith(prefix)
    }


def _unstacked(arrays: Mapping[str, StoredArray], config: GPT2Config) -> dict[str, TensorEntry]:
    """The weights of single layers. Of stacked layers, one more than the model has is enough to be refused."""
    entries = {}
    for path, stored in arrays.items():
        if path.startswith(f"{STACK}/") and stored.shape:
            layers = range(min(stored.shape[0], config.n_layer + 1))
            entries.update({f"{STACK}_{i}{path[len(STACK) :]}": _entry(stored, i) for i in layers})
        else:
            entries[path] = _entry(stored)
    return entries


def _entry(stored: StoredArray, layer: int | None = None) -> TensorEntry:
    if layer is None:
        return TensorEntry(stored.dtype, stored.shape, stored.read)
    return TensorEntry(stored.dtype, stored.shape[1:], lambda: stored.read(layer))


def _without_padding(entry: TensorEntry, config: GPT2Config) -> TensorEntry:
    """The rows of the vocabulary; as it is where there are more than any padding makes."""
    is_padded = bool(entry.shape) and entry.shape[0] <= 2 * config.vocab_size + _MOST_PADDING
    return first_rows(entry, config.vocab_size) if is_padded else entry

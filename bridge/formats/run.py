"""What `gpt2 train` leaves: `config.json`, the tokenizer, and numbered checkpoints that orbax wrote.

A run is read as its best checkpoint by validation loss, or its newest if none was evaluated; one of its
`checkpoints/STEP` directories is read as that one. Where a running mean of the weights is kept (EMA), the mean
is what is read. Orbax stores arrays with tensorstore (zarr in an OCDBT database), which needs no JAX to read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bridge.arrays import TensorEntry, first_rows
from bridge.checkpoint import Checkpoint
from bridge.config import harmless_fields
from bridge.convert import STACK
from bridge.errors import CheckpointError, quoted
from bridge.formats.directory import CONFIG, read_config, read_json, tensors_of_tree

NAME = "run"
RUN = "run.json"
CHECKPOINTS = "checkpoints"
WEIGHTS = ("ema_params", "params")
"""Where a saved state has the weights: the first of these that it holds."""


def sniff(path: Path) -> bool:
    return _is_run(path) or _is_step(path)


def read(path: Path) -> Checkpoint:
    run, step = (path.parent.parent, path) if _is_step(path) else (path, _best(path))
    config, fields = read_config(run / CONFIG)
    entries = {
        name: first_rows(entry, config.vocab_size) if name in ("wte/embedding", "lm_head/embedding") else entry
        for name, entry in _unstacked(_arrays(step / "state")).items()
    }
    tensors = tensors_of_tree(entries, config, step)
    return Checkpoint(config, tensors, NAME, run, harmless_fields(fields), (f"read from {CHECKPOINTS}/{step.name}",))


def steps(run: Path) -> list[int]:
    """The steps of the complete checkpoints, in order. Orbax gives a checkpoint its number once it is complete."""
    folder = run / CHECKPOINTS
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def validation_loss(run: Path, step: int) -> float | None:
    """What was measured when this checkpoint was written, in nats per token; None if nothing was."""
    file = run / CHECKPOINTS / str(step) / "metrics" / "metrics"
    loss = read_json(file).get("val_loss") if file.is_file() else None
    return float(loss) if isinstance(loss, int | float) else None


def best_step(run: Path) -> int | None:
    """The checkpoint with the lowest validation loss; the newest if none was evaluated."""
    losses = {step: validation_loss(run, step) for step in steps(run)}
    evaluated = {step: loss for step, loss in losses.items() if loss is not None}
    return min(evaluated, key=lambda step: evaluated[step]) if evaluated else max(losses, default=None)


def _is_run(path: Path) -> bool:
    return (path / RUN).is_file() and (path / CONFIG).is_file()


def _is_step(path: Path) -> bool:
    return path.name.isdigit() and path.parent.name == CHECKPOINTS and _is_run(path.parent.parent)


def _best(run: Path) -> Path:
    step = best_step(run)
    if step is None:
        raise CheckpointError(f"the run {quoted(run)} has no checkpoint yet; let it train until its first one")
    return run / CHECKPOINTS / str(step)


def _arrays(state: Path) -> dict[str, _Stored]:
    """The saved weights by their path in the Flax tree, none of them read."""
    import tensorstore

    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{state}/"}}
    try:
        keys = tensorstore.KvStore.open(database).result().list().result()
        names = sorted({key.decode().split("/")[0] for key in keys})
        prefix = next((f"{part}." for part in WEIGHTS if any(name.startswith(f"{part}.") for name in names)), None)
        if prefix is None:
            raise CheckpointError(f"{quoted(state)} holds no weights; use another checkpoint of the run")
        return {
            name.removeprefix(prefix).replace(".", "/"): _Stored(
                tensorstore.open({"driver": "zarr3", "kvstore": {**database, "path": f"{name}/"}}).result(), state
            )
            for name in names
            if name.startswith(prefix)
        }
    except (ValueError, OSError) as error:  # CheckpointError is a ValueError and says more
        raise error if isinstance(error, CheckpointError) else _unreadable(state, error) from error


class _Stored:
    """One array of the database, read whole or one layer at a time."""

    def __init__(self, array: Any, state: Path) -> None:
        self._array, self._state = array, state
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype: np.dtype = array.dtype.numpy_dtype

    def entry(self, layer: int | None = None) -> TensorEntry:
        def read() -> np.ndarray:
            part = self._array if layer is None else self._array[layer]
            try:
                return np.ascontiguousarray(part.read().result())
            except (ValueError, OSError) as error:
                raise _unreadable(self._state, error) from error

        return TensorEntry(self.dtype, self.shape if layer is None else self.shape[1:], read)


def _unstacked(arrays: dict[str, _Stored]) -> dict[str, TensorEntry]:
    entries = {}
    for path, stored in arrays.items():
        if path.startswith(f"{STACK}/") and stored.shape:
            entries.update({f"{STACK}_{i}{path[len(STACK) :]}": stored.entry(i) for i in range(stored.shape[0])})
        else:
            entries[path] = stored.entry()
    return entries


def _unreadable(state: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"cannot read {quoted(state)}: {quoted(error)}; use another checkpoint of the run")

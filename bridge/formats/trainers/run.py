"""A run directory of `gpt2 train`: `config.json`, the tokenizer, and numbered Orbax checkpoints.

A run is read as its checkpoint with the lowest validation loss, or its newest if none was evaluated. A path
`RUN/checkpoints/STEP` is read as that checkpoint. If the run trains an adapter or a part of the weights, they are
merged into its base (`run_base.py`). Every file is first verified against the manifest; in a run, damaged checkpoints
are skipped with a warning. If the run keeps an exponential moving average (EMA) of the weights, the average
is read. Orbax stores arrays with tensorstore, which does not need JAX (`bridge.containers.ocdbt`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bridge.adapters.lora import LoRA
from bridge.checkpoint import Checkpoint
from bridge.config import GPT2Config, config_diagnostics, harmless_fields
from bridge.containers.ocdbt import StoredArray, open_arrays
from bridge.conversion import STACK
from bridge.errors import CheckpointError, bullet_list, quoted
from bridge.formats.directory import CONFIG, read_config, read_json, tensors_of_tree
from bridge.formats.format import Format
from bridge.formats.trainers.run_base import BASE, adapter, is_partial, with_base
from bridge.optimizer_state import AdamWState
from bridge.storage import manifest
from bridge.storage.tensors import LazyTensor, LazyTensorMap, first_rows

NAME = "run"
RUN = "run.json"
CHECKPOINTS = "checkpoints"
_MOST_PADDING = 2**16
"""Limit on the padding rows of a vocabulary."""
_NUMBER = re.compile(r"0|[1-9]\d*", re.ASCII)
WEIGHTS = ("ema_params", "params")
"""Keys of the weights in a saved state, in order of preference."""
_ADAMW = "opt_state.0"
"""The key of `optax.ScaleByAdamState` in the state of `optax.adamw`. With Muon it has another key."""


def find(path: Path) -> list[Path]:
    return [path] if is_run(path) or _is_step(path) else []


def read(path: Path) -> Checkpoint:
    skipped: list[str] = []
    folder = path.parent if _is_step(path) else path / CHECKPOINTS
    if folder.is_symlink():
        raise CheckpointError(f"{quoted(folder)} is a link; the checkpoints of a run must be in its directory")
    if _is_step(path):
        run, step = path.parent.parent, path
        verified(run, int(step.name))
    else:
        run, step = path, path / CHECKPOINTS / str(best_valid_step(path, skipped.append))
    config, fields = read_config(run / CONFIG)
    about, arrays = manifest.about(step), _weights(step / "state")
    base = run / BASE if is_partial(about) else None
    if base is None:
        tensors = _canonical(arrays, config, step)
    else:
        tensors = with_base(run, about, _leaves(arrays, config), config)
    notes = (f"read from {CHECKPOINTS}/{step.name}", *skipped, *config_diagnostics(fields))
    return Checkpoint(config, tensors, NAME, run, harmless_fields(fields), notes, source=step, base_source=base)


def adamw_state(step: Path, config: GPT2Config) -> AdamWState | None:
    """Return AdamW's state in a checkpoint of a run, or None if AdamW does not update every parameter.

    It is None for Muon, which updates the projections itself, and for a run that trains only a part of the weights.

    If the run keeps an average of the weights, the state belongs to the weights that are trained and not to the
    average.

    Args:
        step: `Checkpoint.source` of the run.
        config: the configuration of the model.

    Raises `CheckpointError` or `ConversionError` for a damaged state.
    """
    if is_partial(manifest.about(step)):
        return None
    arrays = open_arrays(step / "state")
    moments = [_below(arrays, f"{_ADAMW}.{name}.") for name in ("mu", "nu")]
    count = arrays.get(f"{_ADAMW}.count")
    if count is None or not all(moments):
        return None
    if count.shape != () or count.dtype.kind not in "iu":
        raise CheckpointError(f"{quoted(step)}: the step count of AdamW is not a number; use another checkpoint")
    exp_avg, exp_avg_sq = (_canonical(moment, config, step) for moment in moments)
    return AdamWState(int(count.read()), exp_avg, exp_avg_sq)


def adapter_of(step: Path, config: GPT2Config) -> LoRA | None:
    """Return the adapter in a checkpoint of a run, or None if the run trains none.

    Args:
        step: `Checkpoint.source` of the run.
        config: the configuration of the model.

    Raises `CheckpointError` or `ConversionError` for a damaged checkpoint.
    """
    about = manifest.about(step)
    if not is_partial(about) or not about["config"].get("lora_rank"):
        return None
    return adapter(about, _leaves(_weights(step / "state"), config), config)


def steps(run: Path) -> list[int]:
    """Return the steps of the checkpoints, in order. A checkpoint gets its name after all of its files are on disk."""
    folder = run / CHECKPOINTS
    return sorted(int(p.name) for p in folder.iterdir() if _NUMBER.fullmatch(p.name)) if folder.is_dir() else []


def committed_steps(run: Path) -> list[int]:
    """Return the steps whose manifest is valid. The files are not verified."""
    return [step for step in steps(run) if _about(run, step) is not None]


def validation_loss(run: Path, step: int) -> float | None:
    """Return the validation loss recorded with this checkpoint, in nats per token.

    None if it was not evaluated, or on other data than the run has now.
    """
    loss: Any = None if has_other_validation(run, step) else (_about(run, step) or {}).get("val_loss")
    is_number = type(loss) in (int, float) and abs(loss) <= sys.float_info.max  # False for NaN
    return float(loss) if is_number else None


def has_other_validation(run: Path, step: int) -> bool:
    """Whether a checkpoint was evaluated on other data than the run has now: the run was resumed with changes.

    Earlier versions recorded only the fingerprint of all data. A damaged run.json tells nothing, and neither does a
    checkpoint without fingerprints.
    """
    now, then = _described(run), _about(run, step) or {}
    recorded = [name for name in ("data", "validation") if name in then]
    return bool(now) and bool(recorded) and all(then[name] != now.get(name) for name in recorded)


def verified(run: Path, step: int) -> dict[str, Any]:
    """Verify every file of a checkpoint and return the `about` of its manifest.

    Raises `CheckpointError` if a file was changed or the manifest belongs to another step.
    """
    path = run / CHECKPOINTS / str(step)
    about = manifest.verify(path)
    if not _has_step(about, step):
        raise CheckpointError(f"{quoted(path)} is the checkpoint of step {quoted(about.get('step'))}")
    return about


def first_valid(run: Path, candidates: Iterable[int], say: Callable[[str], object]) -> int | None:
    """Return the first of these checkpoints that is valid. Calls `say` with a message for each damaged one."""
    for step in candidates:
        try:
            verified(run, step)
            return step
        except CheckpointError as error:
            say(f"the checkpoint of step {step} is damaged and was skipped: {error}")
    return None


def best_valid_step(run: Path, say: Callable[[str], object]) -> int:
    """Return the first valid step in the order of `steps_by_loss`.

    Calls `say` with a message for each damaged checkpoint that was or may have been better. The loss of a checkpoint
    without a valid manifest is unknown.

    Raises `CheckpointError` if there is no valid checkpoint.
    """
    damaged: list[str] = []
    best = steps_by_loss(run)
    step = first_valid(run, [*(step for step in reversed(steps(run)) if step not in best), *best], damaged.append)
    if step is None and damaged:
        raise CheckpointError(f"the run {quoted(run)} has no valid checkpoint:\n{bullet_list(damaged)}")
    if step is None:
        raise CheckpointError(
            f"the run {quoted(run)} has no checkpoint yet; continue it with gpt2 train --resume until it writes one"
        )
    for line in damaged:
        say(line)
    return step


def steps_by_loss(run: Path) -> list[int]:
    """Return the committed steps, best first: by validation loss, then those that were not evaluated, newest first."""
    losses = {step: validation_loss(run, step) for step in committed_steps(run)}
    evaluated = {step: loss for step, loss in losses.items() if loss is not None}
    return sorted(evaluated, key=lambda step: evaluated[step]) + sorted({*losses} - {*evaluated}, reverse=True)


def _about(run: Path, step: int) -> dict[str, Any] | None:
    try:
        about = manifest.about(run / CHECKPOINTS / str(step))
    except CheckpointError:
        return None
    return about if _has_step(about, step) else None


def _has_step(about: Mapping[str, Any], step: int) -> bool:
    return type(about.get("step")) is int and about["step"] == step


def is_run(path: Path) -> bool:
    """Whether a directory is a run of this project. Another program's `run.json` alone does not count."""
    if not ((path / RUN).is_file() and (path / CONFIG).is_file()):
        return False
    return (path / CHECKPOINTS).is_dir() or {"version", "config", "data"} <= _described(path).keys()


def _described(path: Path) -> dict[str, Any]:
    try:
        return read_json(path / RUN)
    except CheckpointError:
        return {}


def _is_step(path: Path) -> bool:
    return bool(_NUMBER.fullmatch(path.name)) and path.parent.name == CHECKPOINTS and is_run(path.parent.parent)


def _weights(state: Path) -> dict[str, StoredArray]:
    """Return the saved weights by their path in the Flax tree, without reading them."""
    arrays = open_arrays(state)
    for part in WEIGHTS:
        if weights := _below(arrays, f"{part}."):
            return weights
    raise CheckpointError(f"{quoted(state)} holds no weights; use another checkpoint of the run")


def _below(arrays: Mapping[str, StoredArray], prefix: str) -> dict[str, StoredArray]:
    """Return the arrays of a part of the state by their path in the Flax tree of that part."""
    return {
        name.removeprefix(prefix).replace(".", "/"): array for name, array in arrays.items() if name.startswith(prefix)
    }


def _canonical(arrays: Mapping[str, StoredArray], config: GPT2Config, step: Path) -> LazyTensorMap:
    """Return a Flax tree as canonical tensors."""
    return tensors_of_tree(_leaves(arrays, config), config, step)


def _leaves(arrays: Mapping[str, StoredArray], config: GPT2Config) -> dict[str, LazyTensor]:
    """Return the leaves of a Flax tree with unstacked layers, without the padding of the vocabulary."""
    return {
        name: _without_padding(entry, config) if name in ("wte/embedding", "lm_head/embedding") else entry
        for name, entry in _unstacked(arrays, config).items()
    }


def _unstacked(arrays: Mapping[str, StoredArray], config: GPT2Config) -> dict[str, LazyTensor]:
    """Split stacked layers into single ones.

    If there are more layers than `n_layer`, only one more is split, which is enough to fail the check of the names.
    """
    entries = {}
    for path, stored in arrays.items():
        if path.startswith(f"{STACK}/") and stored.shape:
            layers = range(min(stored.shape[0], config.n_layer + 1))
            entries.update({f"{STACK}_{i}{path[len(STACK) :]}": _entry(stored, i) for i in layers})
        else:
            entries[path] = _entry(stored)
    return entries


def _entry(stored: StoredArray, layer: int | None = None) -> LazyTensor:
    if layer is None:
        return LazyTensor(stored.dtype, stored.shape, stored.read)
    return LazyTensor(stored.dtype, stored.shape[1:], lambda: stored.read(layer))


def _without_padding(entry: LazyTensor, config: GPT2Config) -> LazyTensor:
    """Remove padding rows of the vocabulary. Returns the entry unchanged if it has more rows than padding can add."""
    is_padded = bool(entry.shape) and entry.shape[0] <= 2 * config.vocab_size + _MOST_PADDING
    return first_rows(entry, config.vocab_size) if is_padded else entry


FORMAT = Format(name=NAME, find=find, read=read)

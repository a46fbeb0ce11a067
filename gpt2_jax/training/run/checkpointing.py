"""Checkpoints of a run, written asynchronously by Orbax: the last few, and the best.

Orbax fsyncs array data but not metadata or the final rename, and does not detect corrupted bytes of an array on load.
(It does detect missing chunks, which tensorstore alone reads as zeros.) A checkpoint is therefore committed in five
steps: Orbax writes it under a hidden name; the files are fsynced; a manifest is added (`bridge.storage.manifest`); the
files are read back and verified; the directory is renamed to its step. A directory named after a step is always
complete.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from bridge import BridgeError
from bridge.containers.ocdbt import StoredArray, open_arrays
from bridge.errors import bullet_list, quoted
from bridge.formats.trainers.run import (
    CHECKPOINTS,
    committed_steps,
    first_valid,
    has_other_validation,
    steps,
    steps_by_loss,
    validation_loss,
)
from bridge.storage import manifest
from bridge.storage.atomic_writes import foreign_files
from bridge.storage.fsync import flush_to_disk
from gpt2_jax.parallel.distributed import broadcast_from_first, is_first, wait_for_all
from gpt2_jax.training.errors import TrainingError, is_out_of_memory
from gpt2_jax.training.state import TrainState

PARTIAL = ".{}.partial"
_LEFTOVER = re.compile(r"\.(0|[1-9]\d*)\.partial(\.orbax-checkpoint-tmp.*)?")
"""Leftovers of a killed process: the hidden directory, and Orbax's temporary directory beside it."""


class Checkpoints:
    """The checkpoints of one run, numbered by their step.

    A context manager: on exit, it waits for a pending save and raises its error. With several processes, each writes
    its own shards, and the first writes the manifest and renames the directory.

    Args:
        about: further fields of the manifests, beside the step and the loss, that identify the run.
        say: called with a message about every damaged checkpoint that is skipped.
    """

    def __init__(
        self,
        run: Path,
        keep_last: int = 2,
        about: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._run, self._folder = run, (run / CHECKPOINTS).absolute()
        self._keep_last, self._about, self._say = keep_last, dict(about or {}), say
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: tuple[int, Future[None]] | None = None
        self.newest: int | None = None
        """The step that was last saved or restored."""
        if is_first():
            self._folder.mkdir(parents=True, exist_ok=True)
            flush_to_disk(self._folder.parent)
            for leftover in [path for path in self._folder.iterdir() if _LEFTOVER.fullmatch(path.name)]:
                self._remove(leftover)
        wait_for_all("the folder of checkpoints")

    def latest(self) -> int | None:
        """Return the step of the newest valid checkpoint.

        If there is one, damaged checkpoints are renamed to STEP.damaged, so that they are not counted as the last or
        the best.
        """
        return broadcast_from_first(self._newest_valid() if is_first() else None)

    def _newest_valid(self) -> int | None:
        newest, damaged = None, []
        for step in steps(self._run):
            if first_valid(self._run, [step], self._say) is None:
                damaged.append(self._folder / str(step))
            else:
                newest = step
        for path in damaged if newest is not None else ():
            path.rename(_unused_name(path.with_name(f"{path.name}.damaged")))
        return newest

    def save(self, state: TrainState, val_loss: float | None = None) -> None:
        """Start saving `state`. It is copied before this method returns, so its buffers may be donated afterwards.

        `val_loss` selects the best checkpoint. Raises `TrainingError` if this save or the previous one fails, and
        propagates out-of-memory errors of the system or JAX.
        """
        self.wait()
        step = int(state.step)
        partial = self._folder / PARTIAL.format(step)
        with _with_message(f"the checkpoint of step {step} could not be written"), _uncompressed():
            writing = ocp.save_async(partial, state, overwrite=True)
        self.newest = step
        about = {**self._about, "step": step, "val_loss": val_loss}
        self._saving = step, self._thread.submit(self._commit, writing, partial, about)

    def check(self) -> None:
        """Raise `TrainingError` if the pending save has already failed."""
        if self._saving is not None and self._saving[1].done():
            self.wait()

    def wait(self) -> None:
        """Wait until the pending save is on the disk. Raises `TrainingError` if it failed."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with _with_message(f"the checkpoint of step {saving[0]} could not be written"):
                saving[1].result()

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Return the state saved at `step`, placed on the devices of `like`, a tree of arrays or `ShapeDtypeStruct`s.

        Waits for a pending save. Raises as `wait`, and `TrainingError` for a checkpoint that is damaged or whose
        shapes or dtypes differ from those of `like`. Does not use Orbax, which trusts its input and whose error
        messages are pages long.
        """
        self.wait()
        with _with_message(f"the checkpoint of step {step} could not be read; is it damaged?"):
            stored = {name.replace(".", "/"): array for name, array in open_arrays(self._state(step)).items()}
            found = {name: (array.shape, str(array.dtype)) for name, array in stored.items()}
            expected = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in _named_leaves(like)}
            if found == expected:
                leaves = [_placed(stored[name], leaf) for name, leaf in _named_leaves(like)]
                self.newest = step
                return jax.tree.unflatten(jax.tree.structure(like), leaves)
        names = [name for name in expected | found if expected.get(name) != found.get(name)]
        problems = [f"{n}: {_formatted(found.get(n))} is stored, {_formatted(expected.get(n))} expected" for n in names]
        raise TrainingError(
            f"the checkpoint of step {step} belongs to another model or optimizer:\n{bullet_list(problems)}"
        )

    def _state(self, step: int) -> Path:
        return self._folder / str(step) / "state"

    def loss(self, step: int) -> float | None:
        """Return the validation loss recorded with this checkpoint, or None if it is of other data."""
        return broadcast_from_first(validation_loss(self._run, step) if is_first() else None)

    def has_other_validation(self, step: int) -> bool:
        """Whether this checkpoint was evaluated on other data than the run has now."""
        return broadcast_from_first(is_first() and has_other_validation(self._run, step))

    def lowest_loss(self) -> float:
        """Return the validation loss of the best checkpoint, or infinity if none was evaluated."""
        step = broadcast_from_first(next(iter(steps_by_loss(self._run)), None) if is_first() else None)
        loss = None if step is None else self.loss(step)
        return float("inf") if loss is None else loss

    def add_loss(self, step: int, val_loss: float) -> None:
        """Record the validation loss of a checkpoint that was saved before its evaluation on this data."""
        if is_first():
            temporary = self._folder / PARTIAL.format(step)
            with _with_message(f"the loss of the checkpoint of step {step} could not be written"):
                changes = {"val_loss": val_loss, "validation": self._about.get("validation")}
                manifest.amend(self._folder / str(step), changes, temporary)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()
        if kind is None:
            wait_for_all("the last checkpoint")

    def _commit(self, writing: Any, partial: Path, about: Mapping[str, Any]) -> None:
        """Commit the checkpoint after Orbax has written all of it on every process."""
        try:
            writing.result()
            if is_first():
                manifest.commit(partial, about)
                manifest.verify(partial, from_disk=True)
                partial.rename(self._folder / str(about["step"]))
                flush_to_disk(self._folder)
        except BaseException:
            if is_first():
                for leftover in self._folder.iterdir():
                    if (match := _LEFTOVER.fullmatch(leftover.name)) and int(match[1]) == about["step"]:
                        shutil.rmtree(leftover, ignore_errors=True)
            raise
        if is_first():
            self._prune()

    def _prune(self) -> None:
        """Remove all checkpoints but the last and the best. Called after a newer valid one was committed."""
        committed = committed_steps(self._run)
        kept = {*committed[-self._keep_last :], *steps_by_loss(self._run)[:1]}
        for step in committed:  # a damaged checkpoint stays for inspection
            if step not in kept:
                path = self._folder / str(step)
                if foreign := foreign_files(path, manifest.recorded(path).__contains__):
                    names = ", ".join(map(quoted, foreign[:10]))
                    self._say(
                        f"{quoted(path)} is not removed, because it holds files that training did not write: {names}"
                    )
                else:
                    self._remove(path, self._folder / PARTIAL.format(step))

    def _remove(self, path: Path, hidden: Path | None = None) -> None:
        """Remove a directory, or report why not (another owner, or in use on NFS). The next start retries."""
        try:
            if hidden is not None:
                path = path.rename(hidden)  # rename first: a partly removed checkpoint must not look valid
                flush_to_disk(self._folder)
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError as error:
            self._say(f"{quoted(path)} could not be removed: {error.strerror or error}")


def _uncompressed() -> ocp.Context:
    """Return a context without compression. On CPU, compression takes longer than the manifest and saves only 9 %."""
    context = ocp.Context()
    context.array.saving.use_compression = False
    return context


@contextmanager
def _with_message(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax also raises errors of tensorstore and the system
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {quoted(str(error).partition(chr(10))[0], 400)}"
        raise TrainingError(f"{what}\n{error if isinstance(error, BridgeError) else reason}") from error


def _unused_name(path: Path) -> Path:
    """Return an unused name: `path`, or `path` with a number."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(name for name in itertools.chain([path], numbered) if not os.path.lexists(name))


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _formatted(array: tuple[tuple[int, ...], str] | None) -> str:
    return "nothing" if array is None else f"{array[1]} {array[0]}"


def _placed(stored: StoredArray, like: Any) -> jax.Array:
    """Return the array with the sharding of `like`. A part that several devices hold is read once."""
    parts: dict[str, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        if str(index) not in parts:
            parts[str(index)] = stored.read(index)
        return parts[str(index)]

    return jax.make_array_from_callback(tuple(like.shape), like.sharding, part, dtype=like.dtype)

"""Checkpoints of a run, written by orbax while training goes on: the last few, and the best."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint.experimental.v1 import training
from orbax.checkpoint.experimental.v1.training import preservation_policies as keep

from bridge.errors import bullet_list, quoted
from bridge.formats.run import CHECKPOINTS
from gpt2_jax.train.config import TrainingError
from gpt2_jax.train.step import TrainState


class Checkpoints:
    """The checkpoints of one run, numbered by their step.

    A context: on leaving, saves that are under way are waited for, and their errors raised.
    """

    def __init__(self, run: Path, keep_last: int = 2) -> None:
        best = keep.BestN(
            n=1, get_metric_fn=lambda metrics: metrics["val_loss"], reverse=True, keep_checkpoints_without_metrics=False
        )
        self._orbax = training.Checkpointer(
            (run / CHECKPOINTS).absolute(),
            preservation_policy=keep.AnyPreservationPolicy([keep.LatestN(keep_last), best]),
            cleanup_tmp_directories=True,
        )
        self._saving: tuple[int, Any] | None = None

    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        newest = self._orbax.latest
        return None if newest is None else newest.step

    def save(self, state: TrainState, val_loss: float | None = None) -> None:
        """Begin to write `state`; the copy is taken before this returns, so its buffers may be donated.

        `val_loss`: by which the best is chosen. Raises `TrainingError` where this save, or the one before,
        fails.
        """
        self.wait()
        step = int(state.step)
        metrics = None if val_loss is None else {"val_loss": val_loss}
        with _explained(f"the checkpoint of step {step} could not be written"):
            self._saving = step, self._orbax.save_async(step, state, force=True, metrics=metrics)

    def wait(self) -> None:
        """Until what `save` began is on the disk; raises `TrainingError` where that failed."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with _explained(f"the checkpoint of step {saving[0]} could not be written"):
                saving[1].result()

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at `step`, with the shapes, dtypes and devices of `like`, arrays or their description.

        Raises `TrainingError` for one that is damaged, or that has other shapes.
        """
        expected = _shapes(like)
        with _explained(f"the checkpoint of step {step} could not be read; is it damaged?"):
            found = _shapes(self._orbax.metadata(step).metadata)
            if found == expected:
                return self._orbax.load(step, jax.tree.map(_description, like))
        names = [name for name in expected | found if expected.get(name) != found.get(name)]
        problems = [f"{n}: {found.get(n, 'nothing')} is stored, {expected.get(n, 'nothing')} expected" for n in names]
        raise TrainingError(f"the checkpoint of step {step} is of another model or optimizer:\n{bullet_list(problems)}")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.wait()
        finally:
            with suppress(Exception):  # orbax raises once more what `wait` has explained
                self._orbax.close()


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # orbax raises its own, tensorstore's and the system's
        raise TrainingError(f"{what}\n{type(error).__name__}: {quoted(error, 400)}") from error


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def _description(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

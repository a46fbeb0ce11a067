"""Saving checkpoints: which ones are kept, and that each holds the state of its step."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from jax.errors import JaxRuntimeError
from rich.console import Console
from support import ocdbt_bytes
from support.refusals import within_budget
from support.training_runs import all_weights, data_for, recipe, run_in, stop_at

from bridge.formats.trainers.run import steps, steps_by_loss
from bridge.storage import manifest
from gpt2_jax.training import TrainingError, loop, resolve_config
from gpt2_jax.training.run.checkpointing import Checkpoints

pytestmark = pytest.mark.usefixtures("quick_compilation")


def scripted_losses(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    monkeypatch.setattr(
        loop, "validation_loss", lambda eval_step, config, data, state, mesh, check: losses[int(state.step)]
    )


def test_the_best_checkpoint_is_kept_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted_losses(monkeypatch, {0: 9.0, 1: 5.0, 2: 3.0, 3: 4.0, 4: 4.5, 5: 3.5, 6: 6.0})
    outcome = run_in(tmp_path, recipe(eval_every=1, checkpoint_every=1, keep_last=2))
    assert steps(outcome.run) == [2, 5, 6]
    assert (outcome.best_step, outcome.best_val_loss) == (2, 3.0)
    best, export = all_weights(outcome.run / "checkpoints" / "2"), all_weights(outcome.export)
    assert all(np.array_equal(export[name], array) for name, array in best.items())


def test_a_better_state_is_saved_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a resume, which reads the best loss from the checkpoints."""
    scripted_losses(monkeypatch, {0: 9.0, 1: 5.0, 2: 6.0, 3: 4.0, 4: 4.5, 5: 4.2, 6: 8.0})
    saved = []
    inner = Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, state, loss: saved.append((int(state.step), loss)) or inner(self, state, loss)
    )
    changes = recipe(eval_every=1, checkpoint_every=100, keep_last=1)
    with monkeypatch.context() as stopping:
        stop_at(stopping, 4, lambda: signal.raise_signal(signal.SIGTERM))
        run_in(tmp_path, changes)
    assert saved == [(1, 5.0), (3, 4.0), (4, 4.5)]
    outcome = run_in(tmp_path, changes, resume=True)
    assert saved[3:] == [(6, 8.0)]
    assert steps(outcome.run) == [3, 6]
    assert outcome.best_step == 3


def test_without_an_evaluation_the_newest_checkpoint_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 4, lambda: signal.raise_signal(signal.SIGTERM))
    outcome = run_in(tmp_path, recipe(eval_every=100))
    assert (outcome.best_step, outcome.best_val_loss) == (4, None)
    assert steps_by_loss(outcome.run)[0] == 4


def test_the_saved_state_is_that_of_its_step_although_its_buffers_are_donated(tmp_path: Path) -> None:
    """Saving continues while the next steps overwrite the donated memory."""
    numbers = {"a": jax.numpy.zeros(2**20), "b": jax.numpy.ones(2**19)}
    step = jax.jit(
        lambda s: s._replace(step=s.step + 1, params=jax.tree.map(lambda x: x + 1, s.params)), donate_argnums=0
    )
    state = loop.TrainState(jax.numpy.int32(0), numbers, None)
    with Checkpoints(tmp_path, keep_last=9) as checkpoints:
        for _ in range(3):
            state = step(state)
            checkpoints.save(state)
            for _ in range(20):
                state = step(state)
        for saved in (1, 22, 43):
            found = checkpoints.restore(saved, state)
            assert int(found.step) == saved
            np.testing.assert_array_equal(found.params["a"], saved)
            np.testing.assert_array_equal(found.params["b"], saved + 1)


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    """They count neither as the last nor as the best."""

    def save(*losses: tuple[int, float]) -> None:
        with Checkpoints(tmp_path, keep_last=2) as checkpoints:
            checkpoints.latest()
            for step, loss in losses:
                checkpoints.save(loop.TrainState(jax.numpy.int32(step), {"a": jax.numpy.ones(9)}, None), loss)
                checkpoints.wait()

    save((3, 0.5), (6, 1.5), (9, 1.0))
    assert steps(tmp_path) == [3, 6, 9]
    for damaged in ("3", "9"):
        next((tmp_path / "checkpoints" / damaged / "state").glob("*")).rename(tmp_path / f"of {damaged}")
    (tmp_path / "checkpoints" / ".7.partial.orbax-checkpoint-tmp").mkdir()
    save((7, 0.9))
    assert steps(tmp_path) == [6, 7]
    assert steps_by_loss(tmp_path)[0] == 7
    save((8, 1.2), (10, 1.3), (11, 1.4))
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["10", "11", "3.damaged", "7", "9.damaged"]


def test_the_export_names_its_checkpoint(tmp_path: Path) -> None:
    outcome = run_in(tmp_path, recipe())
    about = manifest.verify(outcome.export)
    assert (about["step"], about["val_loss"]) == (outcome.best_step, outcome.best_val_loss)
    best, export = all_weights(outcome.run / "checkpoints" / str(about["step"])), all_weights(outcome.export)
    assert all(np.array_equal(export[name], array) for name, array in best.items())


def test_a_checkpoint_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    state = loop.TrainState(jax.numpy.int32(3), {"a": jax.random.normal(jax.random.key(0), (2**18,))}, None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (
        pytest.raises(TrainingError, match="checkpoint of step 3 could not be written"),
        Checkpoints(tmp_path) as checkpoints,
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
        try:
            checkpoints.save(state)
            checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps(tmp_path) == []


def save_all(checkpoints: Checkpoints, *all_steps: int) -> None:
    for step in all_steps:
        checkpoints.save(state_at(step))
        checkpoints.wait()


def state_at(step: int) -> loop.TrainState:
    return loop.TrainState(jax.numpy.int32(step), {"a": jax.numpy.ones(9)}, None)


def test_an_old_checkpoint_that_cannot_be_removed_is_named_and_saving_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    remove = shutil.rmtree

    def busy(path: Path, **options: Any) -> None:
        if path.name == ".3.partial":
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        remove(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", busy)
        with Checkpoints(tmp_path, keep_last=1, say=said.append) as checkpoints:
            save_all(checkpoints, 3, 6, 9)
        assert steps(tmp_path) == [9]
        with Checkpoints(tmp_path, say=said.append) as checkpoints:
            assert checkpoints.latest() == 9
    assert [text.endswith("/.3.partial' could not be removed: Directory not empty") for text in said] == [True, True]
    with Checkpoints(tmp_path):
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["9"]


def test_files_are_verified_as_they_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[str] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *_: forgotten.append(os.readlink(f"/proc/self/fd/{file}")))
    with Checkpoints(tmp_path) as checkpoints:
        save_all(checkpoints, 3)
    named = {name.replace(".3.partial", "3") for name in forgotten}
    written = {str(path) for path in (tmp_path / "checkpoints" / "3").rglob("*") if path.is_file()}
    assert named == written - {str(tmp_path / "checkpoints" / "3" / "manifest.json")}


def test_the_log_is_flushed_before_the_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed, save, flush = [], ocp.save_async, os.fsync

    def note(file: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{file}"))
        flush(file)

    def save_after(*arguments: Any, **options: Any) -> Any:
        assert str(tmp_path / "run" / "metrics.jsonl") in flushed
        flushed.clear()
        return save(*arguments, **options)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(ocp, "save_async", save_after)
    assert steps(run_in(tmp_path, recipe()).run) == [4, 6]


def test_nothing_is_compressed(tmp_path: Path) -> None:
    """Compression takes more time than it saves, because weights and moments hardly compress."""
    state = loop.TrainState(jax.numpy.int32(3), {"a": jax.numpy.zeros(2**20)}, None)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    files = [path for path in (tmp_path / "checkpoints" / "3").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) > 2**22


def test_out_of_memory_is_not_reported_as_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any, **__: Any) -> None:
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with Checkpoints(tmp_path) as checkpoints:
        save_all(checkpoints, 3)
        monkeypatch.setattr(jax, "make_array_from_callback", too_large)
        with pytest.raises(JaxRuntimeError):
            checkpoints.restore(3, state_at(3))


@pytest.mark.parametrize(
    "name", ["state/_METADATA", "state/_sharding", "state/array_metadatas/process_0", "_CHECKPOINT_METADATA"]
)
@pytest.mark.parametrize("content", [b"{", b"[" * 200_000, b'{"tree_metadata": {"x": 1}, "use_ocdbt": false}'])
def test_files_that_only_orbax_needs_are_not_read(tmp_path: Path, name: str, content: bytes) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        save_all(checkpoints, 3)
        path = tmp_path / "checkpoints" / "3"
        (path / name).write_bytes(content)
        manifest.commit(path, {"step": 3, "val_loss": None})
        assert checkpoints.latest() == 3
        assert int(checkpoints.restore(3, state_at(3)).step) == 3


@pytest.mark.parametrize(
    ("shape", "said"),
    [([2**40], "out of range"), ([2**40, 2**40], "out of range"), ([3], "another model or optimizer")],
)
def test_a_hostile_checkpoint_is_refused_in_two_lines(tmp_path: Path, shape: list[int], said: str) -> None:
    fields = {
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "data_type": "float32",
        "fill_value": 0.0,
        "node_type": "array",
        "shape": shape,
        "zarr_format": 3,
    }
    with Checkpoints(tmp_path) as checkpoints:
        save_all(checkpoints, 3)
        path = tmp_path / "checkpoints" / "3"
        shutil.rmtree(path / "state")
        key = "params.a/c" + "/0" * len(shape)
        leaf = ocdbt_bytes.leaf({"params.a/zarr.json": json.dumps(fields).encode(), key: bytes(12)})
        ocdbt_bytes.write(path / "state", [leaf])
        manifest.commit(path, {"step": 3, "val_loss": None})
        with within_budget(), pytest.raises(TrainingError, match=said) as error:
            checkpoints.restore(3, state_at(3))
    assert "Traceback" not in str(error.value) and len(str(error.value)) < 1000


def test_a_best_checkpoint_that_was_damaged_later_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted_losses(monkeypatch, {0: 9.0, 2: 3.0, 4: 4.0, 6: 5.0})
    screen = io.StringIO()
    config = resolve_config(recipe(eval_every=2, checkpoint_every=2), data := data_for(recipe(), tmp_path), None)
    stop_at(monkeypatch, 6, lambda: (tmp_path / "run" / "checkpoints" / "2" / "more").touch())
    outcome = loop.train(config, tmp_path / "run", data, console=Console(file=screen, width=1000))
    assert outcome.best_step == 4
    assert "the checkpoint of step 2 is damaged and was skipped" in screen.getvalue()

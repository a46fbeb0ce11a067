"""Resuming a run: what is refused, what may change, and what changes."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from support.training_runs import RECIPE, all_weights, data_for, files, recipe, records, run_in, write_text

import bridge
from bridge.formats.trainers.run import has_other_validation, steps, validation_loss
from bridge.storage import manifest
from gpt2_jax.data import open_data
from gpt2_jax.parallel.sharding import make_mesh
from gpt2_jax.training import Outcome, TrainingError, loop, resolve_config, train
from gpt2_jax.training.run import directory as runs
from gpt2_jax.training.run.identity import stored_identity
from gpt2_jax.training.run.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_resuming_a_finished_run_changes_nothing(copy: Path) -> None:
    before = files(copy / "run")
    again = run_in(copy, RECIPE, resume=True)
    after = files(copy / "run")
    assert (again.step, again.stopped_by) == (6, None)
    changed = {name for name in before if before[name] != after.get(name)}
    assert changed <= {"loss.png"}
    assert set(after) == set(before)


CHANGES: dict[str, Any] = {
    "max_steps": 7,
    "batch_size": 2,
    "seq_len": 10,
    "num_microbatches": 2,
    "seed": 1,
    "learning_rate": 2e-2,
    "schedule": "constant",
    "optimizer": "muon",
    "weight_decay": 0.0,
    "max_grad_norm": None,
    "ema_decay": 0.9,
    "dtype": "bfloat16",
    "scan": False,
    "examples": "packed",
    "validation_fraction": 0.2,
    "vocab_multiple": 64,
    "n_layer": 3,
    "embd_pdrop": 0.1,
    "init_from": "elsewhere",
    "tokenizer": "characters",
    "preset": "finetune",
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_resume_with_another_value_is_refused_by_its_name(copy: Path, name: str) -> None:
    before = files(copy / "run")
    with pytest.raises(TrainingError, match=rf"(?m)^  - {name} was .*, now ") as raised:
        run_in(copy, recipe(**{name: CHANGES[name]}), resume=True)
    assert "--accept-changes" in str(raised.value)
    assert files(copy / "run") == before


@pytest.mark.parametrize("accept_changes", [False, True])
def test_a_last_step_before_the_newest_checkpoint_is_refused(copy: Path, accept_changes: bool) -> None:
    """Also without --accept-changes, which would not help."""
    before = files(copy / "run")
    message = r"max_steps=5: the newest checkpoint in '.*run' is already at step 6; give --max-steps 6 or more"
    with pytest.raises(TrainingError, match=message) as raised:
        run_in(copy, recipe(max_steps=5), resume=True, accept_changes=accept_changes)
    assert "--accept-changes" not in str(raised.value)
    assert files(copy / "run") == before


def test_every_change_is_named_at_once(copy: Path) -> None:
    with pytest.raises(TrainingError) as raised:
        run_in(copy, recipe(seed=1, batch_size=2, beta2=0.5), resume=True)
    assert str(raised.value).count("\n  - ") == 3


def test_a_resume_on_other_data_is_refused(copy: Path) -> None:
    write_text(copy, lines=119)
    with pytest.raises(TrainingError, match="data: the tokens are not the same"):
        run_in(copy, RECIPE, resume=True)


def test_losses_of_other_validation_data_are_not_compared(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new losses are all higher. Neither early stopping nor the best checkpoint considers the earlier ones."""
    losses = {6: 100.0, 7: 99.0, 8: 98.0, 9: 98.5, 10: 98.4, 11: 1.0}
    monkeypatch.setattr(
        loop, "validation_loss", lambda eval_step, config, data, state, mesh, check: losses[int(state.step)]
    )
    (copy / "val.txt").write_text("other text of the validation data, " * 20)
    run, cache = copy / "run", copy / "cache"
    data = open_data(copy / "text.txt", tokenizer="bytes", validation=copy / "val.txt", cache=cache)
    console = Console(file=io.StringIO())
    before = read_metrics(run)

    config = resolve_config(recipe(max_steps=8, eval_every=1, checkpoint_every=1, early_stopping=1), data)
    outcome = train(config, run, data, resume=True, accept_changes=True, console=console)
    assert (outcome.step, outcome.best_step, outcome.best_val_loss) == (8, 8, 98.0)
    found = {r["step"]: r for r in read_metrics(run)}
    assert [found[r["step"]].get("val_loss") for r in before[:-1]] == [r.get("val_loss") for r in before[:-1]]
    assert [(step, r["val_loss"]) for step, r in found.items() if step >= 6] == [(6, 100.0), (7, 99.0), (8, 98.0)]
    assert [step for step, r in found.items() if "validation_changed" in r] == [6]

    config = resolve_config(recipe(max_steps=12, eval_every=1, checkpoint_every=1, early_stopping=2), data)
    outcome = train(config, run, data, resume=True, accept_changes=True, console=console)
    assert (outcome.step, outcome.best_step, outcome.best_val_loss) == (10, 8, 98.0)
    assert [r["step"] for r in read_metrics(run) if "validation_changed" in r] == [6]


@pytest.mark.parametrize(
    ("changes", "is_other"),
    [
        ({}, False),
        ({"data": "other"}, False),  # other training data, or another set after the first one
        ({"validation": "other"}, False),  # the same data as that of an earlier version
        ({"data": "other", "validation": "other"}, True),
        ({"data": "other", "validation": None}, True),
    ],
    ids=str,
)
def test_a_loss_of_other_validation_data_is_not_that_of_a_checkpoint(
    changes: dict[str, Any], is_other: bool, copy: Path
) -> None:
    run = copy / "run"
    loss = validation_loss(run, 6)
    assert loss is not None
    manifest.amend(run / "checkpoints" / "6", changes, copy / "beside")
    assert has_other_validation(run, 6) == is_other
    assert validation_loss(run, 6) == (None if is_other else loss)
    (run / "run.json").write_text("{")
    assert validation_loss(run, 6) == loss


def test_fields_of_reports_may_change(copy: Path) -> None:
    changed = recipe(eval_every=1, log_every=1, checkpoint_every=1, keep_last=5, eval_batches=1)
    assert run_in(copy, changed, resume=True).step == 6
    assert stored_identity(copy / "run").config.keep_last == 5


def test_accepted_changes_are_stored_and_used(copy: Path) -> None:
    changed = recipe(max_steps=8, seed=5, layer_norm_epsilon=1e-4)
    outcome = run_in(copy, changed, resume=True, accept_changes=True)
    assert outcome.step == 8
    assert [record["step"] for record in read_metrics(copy / "run")] == [0, 2, 4, 6, 8]
    assert stored_identity(copy / "run").config == replace(changed, examples="stream")  # "auto" for text
    assert bridge.load(copy / "run").config.layer_norm_epsilon == 1e-4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_inner": 44}, r"params/h/mlp/c_fc/kernel: float32 \(2, 24, 40\) is stored, float32 \(2, 24, 44\) expected"),
        ({"ema_decay": 0.9}, r"ema_params/wte/embedding: nothing is stored, float32 \(384, 24\) expected"),
        ({"optimizer": "muon"}, r"opt_state/0/count: int32 \(\) is stored, nothing expected"),
    ],
    ids=["model", "mean", "optimizer"],
)
def test_a_state_of_another_shape_is_refused_and_the_run_stays_readable(
    copy: Path, change: dict[str, Any], named: str
) -> None:
    before = files(copy / "run")
    with pytest.raises(TrainingError, match=f"(?s)checkpoint of step 6 belongs to another model or optimizer.*{named}"):
        run_in(copy, recipe(**change), resume=True, accept_changes=True)
    assert files(copy / "run") == before


def test_a_run_without_a_checkpoint_resumes_from_the_beginning(tmp_path: Path, finished: Outcome) -> None:
    runs.create(tmp_path / "run", RECIPE, data_for(RECIPE, tmp_path))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "val_loss": 1.0}\n{"step": 2, "train_lo')
    assert run_in(tmp_path, RECIPE, resume=True).step == 6
    assert [record["step"] for record in records(tmp_path / "run")] == [0, 2, 4, 6]
    assert read_metrics(tmp_path / "run")[0]["val_loss"] == read_metrics(finished.run)[0]["val_loss"]


def test_a_run_without_a_checkpoint_can_change_its_tokenizer(tmp_path: Path) -> None:
    first = recipe(tokenizer="characters", vocab_size=50)
    data = data_for(first, tmp_path)
    runs.create(tmp_path / "run", resolve_config(first, data), data)
    with pytest.raises(TrainingError, match="tokenizer was"):
        run_in(tmp_path, RECIPE, resume=True)
    run_in(tmp_path, RECIPE, resume=True, accept_changes=True)
    assert bridge.load(tmp_path / "run").tokenizer().vocab_size == 257


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"version": 1}',
        '{"version": 1, "config": [], "data": "", "tokenizer": ""}',
        '{"version": 99}',
    ],
)
def test_a_damaged_run_json_is_an_error_that_says_so(copy: Path, text: str) -> None:
    (copy / "run" / "run.json").write_text(text)
    with pytest.raises(bridge.BridgeError, match=r"run\.json|another version"):
        run_in(copy, RECIPE, resume=True)


def test_a_damaged_checkpoint_is_named_skipped_and_kept(copy: Path) -> None:
    """The run continues from the previous checkpoint and ends with the same result."""
    run = copy / "run"
    damaged = run / "checkpoints" / "6"
    before, there = all_weights(damaged), steps(run)
    file = next(p for p in sorted((damaged / "state").rglob("*")) if p.stat().st_size > 1000)
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    file.write_bytes(data)
    said, data_of_run = io.StringIO(), data_for(RECIPE, copy)
    console = Console(file=said, width=1000)
    outcome = train(resolve_config(RECIPE, data_of_run), run, data_of_run, resume=True, console=console)
    assert (
        f"the checkpoint of step 6 is damaged and was skipped: '{file}' was changed after it was written"
        in said.getvalue()
    )
    assert (outcome.step, steps(run)) == (6, there)
    again = all_weights(run / "checkpoints" / "6")
    assert all(np.array_equal(again[name], array) for name, array in before.items())
    assert (run / "checkpoints" / "6.damaged" / file.relative_to(damaged)).read_bytes() == data


def test_a_checkpoint_that_is_a_link_is_not_used(copy: Path) -> None:
    """Others may write to its target, and pruning could not tell what to remove."""
    folder = copy / "run" / "checkpoints"
    (folder / "6").rename(copy / "elsewhere")
    (folder / "6").symlink_to(copy / "elsewhere")
    (folder / ".5.partial").symlink_to(copy / "elsewhere")
    before = files(copy / "elsewhere")
    assert any("'6' is a link" in note or "/6' is a link" in note for note in bridge.load(copy / "run").diagnostics)
    assert run_in(copy, RECIPE, resume=True).step == 6
    assert sorted(p.name for p in folder.iterdir()) == ["4", "6", "6.damaged"]
    assert not (folder / "6").is_symlink()
    assert files(copy / "elsewhere") == before


def test_a_run_with_only_damaged_checkpoints_does_not_start_again(copy: Path) -> None:
    for step in steps(copy / "run"):
        (copy / "run" / "checkpoints" / str(step) / "manifest.json").write_text("{}")
    with pytest.raises(TrainingError, match=r"none of the checkpoints in .* is valid"):
        run_in(copy, RECIPE, resume=True)


def test_a_run_that_is_trained_by_another_process_is_refused(copy: Path) -> None:
    code = "import sys; from pathlib import Path; from gpt2_jax.training.run.directory import locked\n"
    code += "with locked(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(copy / "run")], text=True, **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == "in\n"
        before = files(copy / "run")
        with pytest.raises(TrainingError, match="another process is training in"):
            run_in(copy, RECIPE, resume=True)
        assert files(copy / "run") == before
    assert run_in(copy, RECIPE, resume=True).step == 6


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon", "ema_decay": 0.9, "scan": False}], ids=str)
def test_the_abstract_state_matches_the_initial_state(changes: dict[str, Any]) -> None:
    config = recipe(**changes)
    model, tx = loop.make_model(config), loop.make_optimizer(config.optimizer, 6)
    mesh = make_mesh()
    state, described = loop.initial_state(config, model, tx, None, mesh), loop.abstract_state(config, model, tx, mesh)
    assert jax.tree.structure(described) == jax.tree.structure(state)
    for array, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(described), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (array.shape, array.dtype, array.sharding)


def test_a_resume_creates_no_initial_state(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "initial_state", None)
    assert run_in(copy, RECIPE, resume=True).step == 6


def test_the_data_continues_at_the_step_of_the_run(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(loop, "training_batches", lambda stream, **options: asked.append(options) or iter(()))
    run_in(copy, recipe(seed=3, seq_len=10, batch_size=2), resume=True, accept_changes=True)
    assert asked == [
        {"seed": 3, "seq_len": 10, "batch_size": 2, "start_step": 6, "examples": "stream", "rows": slice(0, 2)}
    ]

"""Whole runs: what they leave, what they refuse, how they end, and what is kept when they go wrong."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from models import random_checkpoint
from training_runs import RECIPE, data_for, recipe, records, run_in, write_text

import bridge
from bridge import TokenizerError
from bridge.formats.run import best_step, steps, validation_loss
from gpt2_jax.data import open_data
from gpt2_jax.train import NonFiniteLoss, Outcome, TrainConfig, TrainingError, loop, settle
from gpt2_jax.train import run as runs
from gpt2_jax.train.checkpoint import Checkpoints
from gpt2_jax.train.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, quick_compilation: None) -> Outcome:
    return run_in(tmp_path_factory.mktemp("finished"), RECIPE)


@pytest.fixture
def copy(finished: Outcome, tmp_path: Path) -> Path:
    """The finished run with its data, in a directory of its own: a run may move."""
    shutil.copytree(finished.run.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def all_weights(source: Path) -> dict[str, np.ndarray]:
    return dict(bridge.load(source).tensors.items())


def test_what_a_run_leaves(finished: Outcome) -> None:
    assert (finished.step, finished.stopped_by) == (6, None)
    assert {p.name for p in finished.run.iterdir()} >= {
        "run.json",
        "config.json",
        "metrics.jsonl",
        "loss.png",
        "export",
    }
    assert finished.plot.read_bytes().startswith(b"\x89PNG")
    assert (
        finished.best_val_loss
        == validation_loss(finished.run, finished.best_step)
        == read_metrics(finished.run)[-1]["val_loss"]
    )
    assert json.loads(json.dumps(finished.to_json()))["export"] == str(finished.export)
    assert bridge.load(finished.run).config == RECIPE.model
    assert all(np.isfinite(array).all() for array in all_weights(finished.run).values())


def test_what_is_logged_when(finished: Outcome) -> None:
    """Every log_every=2 and eval_every=4 steps, before the first and after the last."""
    kept = read_metrics(finished.run)
    assert [record["step"] for record in kept] == [0, 2, 4, 6]
    assert [record["step"] for record in kept if "val_loss" in record] == [0, 4, 6]
    logged = {"step", "train_loss", "grad_norm", "learning_rate"}
    assert set(kept[1]) == logged  # no speed yet: the first steps compile
    assert set(kept[3]) == logged | {"val_loss", "tokens_per_second", "mfu"}
    assert kept[1]["learning_rate"] == pytest.approx(1e-2 * 2 / 3)  # of the step that was made, number 1 from 0
    assert kept[3]["train_loss"] < kept[1]["train_loss"]
    assert kept[3]["val_loss"] < kept[0]["val_loss"]


def test_the_last_and_the_best_checkpoints_stay(finished: Outcome) -> None:
    assert steps(finished.run) == [4, 6]  # 3, 4 and 6 were written; keep_last=2


def test_resuming_what_is_finished_changes_nothing(copy: Path) -> None:
    before = files(copy / "run")
    again = run_in(copy, RECIPE, resume=True)
    after = files(copy / "run")
    assert (again.step, again.stopped_by) == (6, None)
    changed = {name for name in before if before[name] != after.get(name)}
    assert changed <= {"loss.png"}
    assert set(after) == set(before)


CHANGES: dict[str, Any] = {
    "steps": 7,
    "batch_size": 2,
    "length": 10,
    "accumulate": 2,
    "seed": 1,
    "learning_rate": 2e-2,
    "schedule": "constant",
    "optimizer": "muon",
    "weight_decay": 0.0,
    "clip_norm": None,
    "ema_decay": 0.9,
    "dtype": "bfloat16",
    "scan": False,
    "examples": "documents",
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


def test_every_change_is_named_at_once(copy: Path) -> None:
    with pytest.raises(TrainingError) as raised:
        run_in(copy, recipe(seed=1, batch_size=2, beta2=0.5), resume=True)
    assert str(raised.value).count("\n  - ") == 3


def test_a_resume_on_other_data_is_refused(copy: Path) -> None:
    write_text(copy, lines=119)
    with pytest.raises(TrainingError, match="data: the tokens are not the same"):
        run_in(copy, RECIPE, resume=True)


def test_what_is_only_reported_may_change(copy: Path) -> None:
    changed = recipe(eval_every=1, log_every=1, checkpoint_every=1, keep_last=5, eval_batches=1)
    assert run_in(copy, changed, resume=True).step == 6
    assert runs.stored_identity(copy / "run").config.keep_last == 5


def test_accepted_changes_are_taken_over(copy: Path) -> None:
    changed = recipe(steps=8, seed=5, layer_norm_epsilon=1e-4)
    outcome = run_in(copy, changed, resume=True, accept_changes=True)
    assert outcome.step == 8
    assert [record["step"] for record in read_metrics(copy / "run")] == [0, 2, 4, 6, 8]
    assert runs.stored_identity(copy / "run").config == changed
    assert bridge.load(copy / "run").config.layer_norm_epsilon == 1e-4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_inner": 44}, r"params/h/mlp/c_fc/kernel: \(2, 24, 40\) is stored, \(2, 24, 44\) expected"),
        ({"ema_decay": 0.9}, r"ema_params/wte/embedding: nothing is stored, \(384, 24\) expected"),
        ({"optimizer": "muon"}, r"opt_state/0/count: \(\) is stored, nothing expected"),
    ],
    ids=["model", "mean", "optimizer"],
)
def test_a_state_of_another_shape_is_refused_and_the_run_stays_readable(
    copy: Path, change: dict[str, Any], named: str
) -> None:
    before = files(copy / "run")
    with pytest.raises(TrainingError, match=f"(?s)checkpoint of step 6 is of another model or optimizer.*{named}"):
        run_in(copy, recipe(**change), resume=True, accept_changes=True)
    assert files(copy / "run") == before


def test_a_run_is_not_begun_where_there_is_one(copy: Path) -> None:
    before = files(copy / "run")
    with pytest.raises(TrainingError, match="--resume"):
        run_in(copy, RECIPE)
    assert files(copy / "run") == before


@pytest.mark.parametrize("make", [lambda p: p.write_text("x"), lambda p: (p.mkdir(), (p / "notes").touch())])
def test_a_run_is_not_begun_on_something_else(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "run")
    before = files(tmp_path)
    with pytest.raises(TrainingError, match="is not a run"):
        run_in(tmp_path, RECIPE)
    assert {name: data for name, data in files(tmp_path).items() if name in before} == before


def test_a_run_that_ended_before_its_first_checkpoint_is_made_anew(tmp_path: Path) -> None:
    first = recipe(tokenizer="characters", n_layer=3, vocab_size=50)
    data = data_for(first, tmp_path)
    runs.begin(tmp_path / "run", settle(first, data), data)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "val_loss": 1.0}\n')
    again = data_for(RECIPE, tmp_path)
    runs.begin(tmp_path / "run", RECIPE, again)
    assert runs.stored_identity(tmp_path / "run") == runs.Identity.of(RECIPE, again)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["n_layer"] == 2
    assert (tmp_path / "run" / "merges.txt").exists()  # the bytes' tokenizer, and not the characters'
    assert read_metrics(tmp_path / "run") == []


def test_a_run_without_a_checkpoint_resumes_from_the_beginning(tmp_path: Path, finished: Outcome) -> None:
    runs.begin(tmp_path / "run", RECIPE, data_for(RECIPE, tmp_path))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "val_loss": 1.0}\n{"step": 2, "train_lo')
    assert run_in(tmp_path, RECIPE, resume=True).step == 6
    assert [record["step"] for record in records(tmp_path / "run")] == [0, 2, 4, 6]
    assert read_metrics(tmp_path / "run")[0]["val_loss"] == read_metrics(finished.run)[0]["val_loss"]


def test_a_run_without_a_checkpoint_takes_over_another_tokenizer(tmp_path: Path) -> None:
    first = recipe(tokenizer="characters", vocab_size=50)
    data = data_for(first, tmp_path)
    runs.begin(tmp_path / "run", settle(first, data), data)
    with pytest.raises(TrainingError, match="tokenizer was"):
        run_in(tmp_path, RECIPE, resume=True)
    run_in(tmp_path, RECIPE, resume=True, accept_changes=True)
    assert bridge.load(tmp_path / "run").tokenizer().n_vocab == 257


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


def test_a_damaged_checkpoint_is_an_error_that_names_it(copy: Path) -> None:
    # Not the arrays: where one fails, orbax may leave reads of others unfinished, which Python warns of at any time.
    (copy / "run" / "checkpoints" / "6" / "state" / "_METADATA").unlink()
    with pytest.raises(TrainingError, match="checkpoint of step 6 could not be read"):
        run_in(copy, RECIPE, resume=True)


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon", "ema_decay": 0.9, "scan": False}], ids=str)
def test_the_description_of_a_state_is_that_of_the_first(changes: dict[str, Any]) -> None:
    config = recipe(**changes)
    model, tx = loop.make_model(config), loop.make_optimizer(config.optimizer, 6)
    state, described = loop.first_state(config, model, tx, None), loop.described_state(config, model, tx)
    assert jax.tree.structure(described) == jax.tree.structure(state)
    for array, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(described), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (array.shape, array.dtype, array.sharding)


def test_a_resume_makes_no_state_beside_the_one_it_restores(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "first_state", None)
    assert run_in(copy, RECIPE, resume=True).step == 6


# How a run ends before its last step.


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], Any]) -> None:
    """Do something while the batch of `step` is read."""
    inner = loop.training_batches

    def batches(*args: Any, start_step: int, **options: Any) -> Iterator[Any]:
        for number, batch in enumerate(inner(*args, start_step=start_step, **options), start=start_step + 1):
            if number == step:
                act()
            yield batch

    monkeypatch.setattr(loop, "training_batches", batches)


def test_a_signal_ends_a_run_after_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM here; `gpt2 train` is sent both in tests/cli."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop_at(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGTERM))
    outcome = run_in(tmp_path, RECIPE)
    assert (outcome.step, outcome.stopped_by) == (5, signal.SIGTERM)
    assert steps(outcome.run)[-1] == 5
    assert outcome.to_json()["stopped_by"] == "SIGTERM"
    assert bridge.load(outcome.export).config.n_layer == 2
    assert [record["step"] for record in read_metrics(outcome.run)] == [0, 2, 4]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_signal_in_the_last_step_ends_nothing_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 6, lambda: signal.raise_signal(signal.SIGTERM))
    outcome = run_in(tmp_path, RECIPE)
    assert (outcome.step, outcome.stopped_by) == (6, None)


def test_a_second_signal_acts_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # which ends the process
        signal.raise_signal(signal.SIGINT)

    stop_at(monkeypatch, 4, twice)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path, RECIPE)
    assert steps(tmp_path / "run") == [3]


def poison(monkeypatch: pytest.MonkeyPatch, step: int, *, before: bool, ema: bool = False) -> None:
    """Make one weight NaN before the update of `step`, or after it, when loss and gradient were still finite."""
    make = loop.make_train_step

    def spoiled(state: Any) -> Any:
        field = "ema_params" if ema else "params"
        tree = getattr(state, field)
        tree["wpe"]["embedding"] = tree["wpe"]["embedding"].at[0, 0].set(np.nan)
        return state._replace(**{field: tree})

    def make_poisoned(*args: Any, **options: Any) -> Callable[..., Any]:
        inner = make(*args, **options)

        def poisoned(state: Any, batch: Any) -> Any:
            now = int(state.step) + 1 == step
            state, metrics = inner(spoiled(state) if now and before else state, batch)
            return spoiled(state) if now and not before else state, metrics

        return poisoned

    monkeypatch.setattr(loop, "make_train_step", make_poisoned)


@pytest.mark.parametrize(
    ("at", "before", "message", "kept"),
    [
        (5, True, "^step 5: loss nan", [3, 4]),  # found when step 6 is logged
        (4, True, "^step 4: loss nan", [3]),
        (3, False, "^step 3: its update made weights", []),
        (4, False, "^step 4: validation loss nan", [3]),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, before: bool, message: str, kept: list[int]
) -> None:
    poison(monkeypatch, at, before=before)
    with pytest.raises(NonFiniteLoss, match=message):
        run_in(tmp_path, RECIPE)
    assert steps(tmp_path / "run") == kept
    for step in kept:
        weights = all_weights(tmp_path / "run" / "checkpoints" / str(step))
        assert all(np.isfinite(array).all() for array in weights.values())
    assert all(np.isfinite(value) for record in read_metrics(tmp_path / "run") for value in record.values())
    if kept == [3, 4]:  # what is kept can be gone on from
        monkeypatch.undo()
        assert run_in(tmp_path, RECIPE, resume=True).step == 6


def test_a_learning_rate_that_is_far_too_high_is_found(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match=r"^step 2: loss"):
        run_in(tmp_path, recipe(learning_rate=1e30))
    assert steps(tmp_path / "run") == []


def test_a_checkpoint_that_is_nan_already_is_found_before_the_first_step(tmp_path: Path) -> None:
    good = random_checkpoint(RECIPE.model)
    weights = dict(good.tensors.items())
    weights["ln_f.weight"] = np.full_like(weights["ln_f.weight"], np.nan)
    with pytest.raises(NonFiniteLoss, match=r"^step 0: validation loss nan"):
        run_in(tmp_path, recipe(init_from="memory"), init_from=bridge.Checkpoint.of(weights, good.config))
    assert steps(tmp_path / "run") == []


# Which checkpoints there are.


def scripted_losses(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    monkeypatch.setattr(loop, "validation_loss", lambda eval_step, config, data, state: losses[int(state.step)])


def test_the_best_stays_and_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted_losses(monkeypatch, {0: 9.0, 1: 5.0, 2: 3.0, 3: 4.0, 4: 4.5, 5: 3.5, 6: 6.0})
    outcome = run_in(tmp_path, recipe(eval_every=1, checkpoint_every=1, keep_last=2))
    assert steps(outcome.run) == [2, 5, 6]
    assert (outcome.best_step, outcome.best_val_loss) == (2, 3.0)
    best, export = all_weights(outcome.run / "checkpoints" / "2"), all_weights(outcome.export)
    assert all(np.array_equal(export[name], array) for name, array in best.items())


def test_a_better_one_is_saved_when_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a resume, which knows the best so far from the checkpoints."""
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


def test_without_an_evaluation_the_newest_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 4, lambda: signal.raise_signal(signal.SIGTERM))
    outcome = run_in(tmp_path, recipe(eval_every=100))
    assert (outcome.best_step, outcome.best_val_loss) == (4, None)
    assert best_step(outcome.run) == 4


def test_what_is_saved_is_the_state_at_that_step_and_not_what_became_of_it(tmp_path: Path) -> None:
    """The save goes on while the next steps write into the same memory."""
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


# Where a run begins.


def test_a_checkpoint_gives_weights_sizes_and_tokenizer_and_the_flags_dropout(tmp_path: Path) -> None:
    source = random_checkpoint(
        bridge.GPT2Config(vocab_size=300, n_positions=14, n_embd=16, n_layer=1, n_head=2, attn_pdrop=0.5)
    )
    config = recipe(init_from="source", resid_pdrop=0.25)
    settled = settle(config, data_for(config, tmp_path), source)
    assert settled.model == bridge.GPT2Config(**{**vars(source.config), "attn_pdrop": 0.0, "resid_pdrop": 0.25})
    model = loop.make_model(settled)
    state = loop.first_state(settled, model, loop.make_optimizer(settled.optimizer, 6), source)
    found = bridge.to_torch(jax.tree.map(np.asarray, state.params), settled.model, vocab_multiple=128)
    assert all(np.array_equal(found[name], array) for name, array in source.tensors.items())


def test_without_one_the_vocabulary_is_the_tokenizers(tmp_path: Path) -> None:
    config = recipe(vocab_size=1000)
    assert settle(config, data_for(config, tmp_path)).model.vocab_size == 257


def test_a_length_that_the_model_has_no_positions_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="length=17: the model has n_positions=16; choose --length 16 or less"):
        settle(recipe(length=17), data_for(RECIPE, tmp_path))


def test_the_seed_draws_the_first_weights(tmp_path: Path) -> None:
    def embedding(config: TrainConfig) -> np.ndarray:
        model = loop.make_model(config)
        return np.array(
            loop.first_state(config, model, loop.make_optimizer(config.optimizer, 6), None).params["wte"]["embedding"]
        )

    assert np.array_equal(embedding(RECIPE), embedding(RECIPE))
    assert not np.array_equal(embedding(RECIPE), embedding(recipe(seed=1)))


def test_the_running_mean_is_what_is_evaluated(tmp_path: Path) -> None:
    state = loop.TrainState(jax.numpy.int32(1), "weights", None, "their mean")
    seen = []

    def eval_step(params: Any, batch: Any) -> tuple[float, int]:
        seen.append(params)
        return 1.0, 2

    assert loop.validation_loss(eval_step, RECIPE, data_for(RECIPE, tmp_path), state) == 0.5
    assert loop.validation_loss(eval_step, RECIPE, data_for(RECIPE, tmp_path), state._replace(ema_params=None)) == 0.5
    assert set(seen) == {"their mean", "weights"}


def test_without_validation_data_no_run_is_begun(tmp_path: Path) -> None:
    data = open_data(write_text(tmp_path), tokenizer="bytes", validation_fraction=0, cache=tmp_path / "cache")
    with pytest.raises(TrainingError, match="no validation data"):
        loop.train(RECIPE, tmp_path / "run", data)
    assert not (tmp_path / "run").exists()


def test_validation_data_without_a_label_is_an_error(tmp_path: Path) -> None:
    state = loop.TrainState(jax.numpy.int32(0), {}, {})
    with pytest.raises(TrainingError, match="nothing to predict"):
        loop.validation_loss(lambda params, batch: (0.0, 0), RECIPE, data_for(RECIPE, tmp_path), state)


def test_an_evaluation_takes_as_many_rows_at_a_time_as_a_step(tmp_path: Path) -> None:
    """And sees the same windows: a batch of 480 in 40 parts does not fit a device in one."""
    seen = []

    def eval_step(params: Any, batch: Any) -> tuple[float, int]:
        seen.append(batch["input_ids"])
        return 1.0, 1

    data, state = data_for(RECIPE, tmp_path), loop.TrainState(jax.numpy.int32(0), {}, {})
    for accumulate in (1, 2):
        loop.validation_loss(eval_step, recipe(accumulate=accumulate), data, state)
    assert [len(ids) for ids in seen] == [4, 4, 2, 2, 2, 2]
    np.testing.assert_array_equal(np.concatenate(seen[:2]), np.concatenate(seen[2:]))


def test_the_data_is_read_as_configured_from_the_step_that_the_run_is_at(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(loop, "training_batches", lambda stream, **options: asked.append(options) or iter(()))
    run_in(copy, recipe(seed=3, length=10, batch_size=2), resume=True, accept_changes=True)
    assert asked == [{"seed": 3, "length": 10, "batch_size": 2, "start_step": 6, "examples": "stream"}]


# What is printed, and other forms of the data.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_prompt": ""}, "has 0 tokens"),
        ({"sample_prompt": "x" * 16}, "has 16 tokens"),
        ({"sample_prompt": "é", "tokenizer": "characters"}, "no character 'é'"),
    ],
)
def test_a_prompt_that_cannot_be_gone_on_from_is_found_before_the_run_begins(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=f"sample_prompt=.*{message}"):
        run_in(tmp_path, recipe(sample_tokens=3, **changes))
    assert not (tmp_path / "run").exists()
    assert settle(recipe(**changes), data_for(recipe(**changes), tmp_path))  # where nothing is sampled it is unused


def test_documents_with_masks_train_too_and_samples_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i:02}.txt").write_text("abcdef " * (i % 7 + 1))
    config = recipe(data=str(texts), examples="documents", sample_tokens=5, sample_prompt="abc", learning_rate=3e-2)
    data = open_data(texts, tokenizer="bytes", cache=tmp_path / "cache")
    outcome = loop.train(settle(config, data), tmp_path / "run", data)
    kept = read_metrics(outcome.run)
    assert kept[-1]["val_loss"] < kept[0]["val_loss"]
    shown = capsys.readouterr().out
    assert shown.count("\nabc") == 2  # at the evaluations after steps 4 and 6
    assert "validation loss" in shown


def test_a_padded_vocabulary_is_no_trouble_to_a_sample(tmp_path: Path) -> None:
    """Ids that the model has and the tokenizer has not, as where a checkpoint's vocabulary is a multiple of 64."""
    model = bridge.GPT2Config(vocab_size=1000, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    config = recipe(init_from="memory", **vars(model), sample_tokens=15)
    data = data_for(config, tmp_path)
    settled = settle(config, data, random_checkpoint(model))
    gpt2 = loop.make_model(settled)
    state = loop.first_state(settled, gpt2, loop.make_optimizer(settled.optimizer, 6), random_checkpoint(model))
    shown = loop.sample(settled, gpt2, state, data, [65, 27, 10])
    assert shown.startswith("A\ufffd\n")  # an escape would move the terminal's cursor
    with pytest.raises((KeyError, TokenizerError)):
        assert data.tokenizer is not None
        data.tokenizer.decode([999])

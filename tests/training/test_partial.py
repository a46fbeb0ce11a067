"""Training a part of the weights: adapters, frozen parameters, layer-wise learning rates, and early stopping."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.commands import run as gpt2
from support.models import random_checkpoint, random_state
from support.refusals import within_budget
from support.training_runs import RECIPE, all_weights, data_for, files, recipe, records, run_in

import bridge
from bridge import Checkpoint, CheckpointError
from bridge.containers.ocdbt import open_arrays
from bridge.formats.trainers.run import adamw_state, adapter_of, steps
from bridge.formats.trainers.run_base import base_digest
from bridge.storage import manifest
from gpt2_jax.parallel.sharding import make_mesh
from gpt2_jax.training import (
    OptimizerConfig,
    Outcome,
    TrainingError,
    TrainState,
    freeze_params,
    join_params,
    make_optimizer,
    resolve_config,
    scale_by_layer,
)
from gpt2_jax.training.evaluation import sample
from gpt2_jax.training.partial import whole_params
from gpt2_jax.training.run import directory
from gpt2_jax.training.run.outcome import finish
from gpt2_jax.training.state import initial_state, make_model

pytestmark = pytest.mark.usefixtures("quick_compilation")
MODEL = RECIPE.model
PARTS: dict[str, dict[str, Any]] = {
    "adapter": {"lora_rank": 2, "lora_alpha": 4.0, "lora_targets": "c_attn,mlp.c_proj", "lora_dropout": 0.1},
    "frozen": {"freeze": "wte|wpe|h_0|.*/scale", "scan": False, "ema_decay": 0.9},
}


def base() -> Checkpoint:
    return random_checkpoint(MODEL)


@pytest.fixture(scope="module")
def finished_parts(
    tmp_path_factory: pytest.TempPathFactory, compiling_quickly: Callable[[], AbstractContextManager[None]]
) -> dict[str, Outcome]:
    """A finished run of each kind. Tests must not write to them."""
    with compiling_quickly():
        return {
            name: run_in(tmp_path_factory.mktemp(name), recipe(**changes), init_from=base())
            for name, changes in PARTS.items()
        }


@pytest.fixture(params=PARTS)
def finished_part(request: pytest.FixtureRequest, finished_parts: dict[str, Outcome]) -> tuple[str, Outcome]:
    return request.param, finished_parts[request.param]


def trained_names(name: str) -> set[str]:
    parameters = {p.torch_name for p in bridge.parameters(MODEL)}
    if name == "adapter":
        return {n for n in parameters if n.endswith(("c_attn.weight", "mlp.c_proj.weight"))}
    return {n for n in parameters if n.startswith("h.1.") and ".ln_" not in n}


@pytest.mark.sampled(2)
def test_only_the_trained_weights_change(finished_part: tuple[str, Outcome]) -> None:
    name, outcome = finished_part
    before, after = random_state(MODEL), all_weights(outcome.run)
    assert {n for n in before if not np.array_equal(before[n], after[n])} == trained_names(name)
    exported = all_weights(outcome.export)
    assert all(np.array_equal(exported[n], array) for n, array in after.items())


def test_a_checkpoint_has_only_the_trained_part(finished_part: tuple[str, Outcome]) -> None:
    name, outcome = finished_part
    arrays = open_arrays(outcome.run / "checkpoints" / "6" / "state")
    parts = {"params": set(), "opt_state.0.mu": set(), "opt_state.0.nu": set(), "ema_params": set()}
    for path in arrays:
        for part, names in parts.items():
            if path.startswith(f"{part}."):
                names.add(path.removeprefix(f"{part}."))
    if name == "adapter":
        expected = {f"h.{module}.{factor}" for module in ("attn.c_attn", "mlp.c_proj") for factor in "ab"}
        assert arrays["params.h.attn.c_attn.b"].shape == (2, 2, 3, 3, 8)
        assert parts.pop("ema_params") == set()
    else:
        expected = {f"h_1.{module}.kernel" for module in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert all(names == expected for names in parts.values())
    assert not any("frozen" in path for path in arrays)
    assert adamw_state(outcome.run / "checkpoints" / "6", MODEL) is None


def test_a_resumed_run_ends_in_the_same_bits(finished_part: tuple[str, Outcome], tmp_path: Path) -> None:
    name, outcome = finished_part
    shutil.copytree(outcome.run.parent, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoints" / "6")
    shutil.rmtree(run / "export")
    again = run_in(tmp_path, recipe(**PARTS[name]), resume=True)  # without the initial checkpoint
    assert records(run) == records(outcome.run)
    weights, expected = all_weights(again.export), all_weights(outcome.export)
    assert all(np.array_equal(weights[n], array) for n, array in expected.items())


def test_the_adapter_is_exported_beside_the_merged_model(finished_parts: dict[str, Outcome]) -> None:
    outcome = finished_parts["adapter"]
    assert outcome.adapter == outcome.run / "adapter" and finished_parts["frozen"].adapter is None
    assert json.loads(json.dumps(outcome.to_json()))["adapter"] == str(outcome.adapter)
    adapter = bridge.load_lora(outcome.adapter)
    assert len(adapter.updates) == 4 and {(u.rank, u.scaling) for u in adapter.updates.values()} == {(2, 2.0)}
    merged, exported = dict(bridge.merge_lora(base(), adapter).tensors), all_weights(outcome.export)
    for name, array in merged.items():
        np.testing.assert_array_equal(exported[name], array)
    assert adapter_of(finished_parts["frozen"].run / "checkpoints" / "6", MODEL) is None


@pytest.mark.parametrize(
    ("init_from", "merged", "expected"),
    [
        ("me/my-gpt2", None, "me/my-gpt2"),
        ("me/my-gpt2", "me/base", None),  # the base is the merged model
        ("here/my-gpt2", None, None),  # a directory that exists
        ("/home/me/my-gpt2", None, None),
        ("bundled", None, None),
        (None, None, None),
    ],
)
def test_the_exported_adapter_names_its_base_only_by_an_id_of_the_hub(
    init_from: str | None,
    merged: str | None,
    expected: str | None,
    finished_parts: dict[str, Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "here" / "my-gpt2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_parts["adapter"].run, tmp_path / "run")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    about["config"] |= {"init_from": init_from, "base": merged}
    folder = finish(tmp_path / "run", about, 6, None).adapter
    assert folder is not None
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == expected


def test_the_commands_read_the_run(finished_part: tuple[str, Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    assert gpt2("inspect", finished_part[1].run) == 0
    assert f"{bridge.num_parameters(MODEL):,}" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["another base", "no base", "a damaged base"])
def test_a_run_with_another_base_is_refused(damage: str, finished_parts: dict[str, Outcome], tmp_path: Path) -> None:
    shutil.copytree(finished_parts["adapter"].run.parent, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "run" / "base"
    weights = folder / "model.safetensors"
    if damage == "no base":
        shutil.rmtree(folder)
    else:
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        if damage == "another base":
            manifest.commit(folder, {})
    message = "not the base" if damage == "another base" else "base"
    with within_budget(), pytest.raises(CheckpointError, match=message):
        bridge.load(tmp_path / "run")
    with pytest.raises((CheckpointError, TrainingError), match=message):
        run_in(tmp_path, recipe(**PARTS["adapter"]), resume=True)


@pytest.mark.parametrize("fields", [{"lora_alpha": "4"}, {"lora_alpha": None}, {"lora_rslora": 1}])
def test_hostile_settings_of_an_adapter_are_refused(
    fields: dict[str, Any], finished_parts: dict[str, Outcome], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_parts["adapter"].run, run)
    step = run / "checkpoints" / "6"
    config = {**manifest.about(step)["config"], **fields}
    manifest.amend(step, {"config": config}, run / "beside")
    with within_budget(), pytest.raises(CheckpointError, match="not those of a run"):
        bridge.load(step)


@pytest.mark.parametrize("changes", PARTS.values(), ids=PARTS)
def test_a_part_of_random_weights_is_not_trained(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="need a model"):
        run_in(tmp_path, recipe(**changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 2, "freeze": "wte"}, "freeze='wte': has no effect with lora_rank"),
        ({"lora_rank": 2, "optimizer": "muon"}, "optimizer=muon: updates projections, which lora_rank freezes"),
        ({"lora_rank": 2, "lora_targets": "q_proj"}, "lora_targets='q_proj': must name c_attn"),
        ({"lora_rank": -1}, "lora_rank=-1: must not be negative"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0: must be at least 0 and below 1"),
        ({"freeze": "h_(0"}, "is not a regular expression"),
        ({"freeze": "[[a]"}, "is not a regular expression"),
        ({"freeze": "(a*)*b"}, "is too complex"),
        ({"freeze": "(?:a)b"}, "is too complex"),
        ({"freeze": ".*.*.*.*"}, "is too complex"),
        ({"freeze": "a" * 2000}, "at most 1000 characters"),
        ({"layer_decay": 0.0}, "layer_decay=0.0: must be above 0 and at most 1"),
        ({"early_stopping": 0}, "early_stopping=0: must be at least 1"),
    ],
)
def test_invalid_parts_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError) as raised:
        recipe(**changes)
    assert message in str(raised.value)


def test_a_restart_before_the_first_checkpoint_replaces_the_base(tmp_path: Path) -> None:
    data, run = data_for(RECIPE, tmp_path), tmp_path / "run"
    config = resolve_config(recipe(**PARTS["adapter"]), data, base())
    directory.create(run, config, data, init_from=base())
    first = base_digest(run)
    directory.create(run, config, data, init_from=random_checkpoint(MODEL, seed=5), resume=True)
    assert base_digest(run) != first
    with pytest.raises(TrainingError, match="need a model"):
        directory.create(run, config, data, resume=True)
    (run / "base" / "mine.txt").write_text("kept")
    with pytest.raises(CheckpointError, match=r"mine\.txt"):
        directory.create(run, config, data, init_from=base(), resume=True)
    (run / "base" / "mine.txt").unlink()
    directory.remove(run)
    assert not run.exists()


@pytest.mark.thorough
def test_a_sample_of_an_adapter_is_that_of_the_merged_model(tmp_path: Path) -> None:
    data = data_for(RECIPE, tmp_path)
    config = resolve_config(recipe(**PARTS["adapter"], sample_tokens=6), data, base())
    model, tx = make_model(config), make_optimizer(config.optimizer, 6)
    with jax.set_mesh(make_mesh("data=1")):
        state = initial_state(config, model, tx, base(), make_mesh("data=1"))
    state = state._replace(params=jax.tree.map(lambda x: x + 0.3, state.params))
    merged = TrainState(state.step, whole_params(model, state.params, state.frozen), None)
    shown = sample(config, model, state, data, [65, 66])
    assert shown == sample(config, model.clone(lora=None), merged, data, [65, 66])
    assert shown != sample(config, model.clone(lora=None), merged._replace(params=state.frozen), data, [65, 66])


# The parts as plain functions


def tree(stacked: bool) -> Any:
    return bridge.to_flax(random_state(MODEL), MODEL, stacked=stacked)


@pytest.mark.parametrize("stacked", [False, True], ids=["layers", "stacked"])
def test_the_frozen_and_the_trained_part_are_joined_again(stacked: bool) -> None:
    params = tree(stacked)
    trained, frozen = freeze_params(params, r"w[tp]e|h_\d+/attn")
    assert set(frozen) == {"wte", "wpe", *(["h"] if stacked else ["h_0", "h_1"])}
    assert "attn" not in trained["h" if stacked else "h_1"] and "ln_f" in trained
    joined = join_params(trained, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, joined, params)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("transformer.h.0", "matches no parameter"),
        ("embedding", "matches no parameter"),
        (".*", "matches every parameter"),
        ("h_0", "matches only some layers of h/"),
    ],
)
def test_a_pattern_that_cannot_freeze_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        freeze_params(tree(stacked=True), pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        ".?" * 34 + "X",
        ".?" * 16 + "()" * 50 + "X",
        "(.*.*.*|b)" * 3 + "X",
        "(.|.)" * 34 + "X",
        "((.|.)(.|.)|b)" * 9 + "X",
        "(.{0,9}|b)" * 4 + "X",
        "|".join([".*.*.*X"] * 9),
        r"(.*[\]()|*]|b)(.*\)|b)(.*|b)(.*|b)X",
        "(.*)?(.*)?X",
    ],
)
def test_a_pattern_that_takes_exponential_time_is_refused(pattern: str) -> None:
    with within_budget(), pytest.raises(TrainingError, match="is too complex"):
        recipe(freeze=pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "wte|wpe|h_[0-3]",
        r"h_\d+/attn/.*",
        ".*/bias",
        "(h_0|h_1)/attn",
        "h_.*/attn",
        r"w[tp]e|h_\d+/attn",
        "wte|wpe|h_0|.*/scale",
        "h_(" + "|".join(map(str, range(48))) + ")/.*(bias|scale)",
        "|".join(f"h_{i}/.*/bias" for i in range(48)),
        r".*/c_(attn|proj)/.*|ln_f?/[*+?|()\]]+|.*.*.*",
    ],
)
def test_usual_patterns_are_accepted(pattern: str) -> None:
    assert recipe(freeze=pattern).freeze == pattern


@pytest.mark.parametrize(
    "pattern", [".*.*.*" + "()" * 92 + "X", "|".join([".*.*.*X"] * 4), ".?" * 16 + "X", "(.|.)" * 14 + "()" * 50 + "X"]
)
def test_a_slow_accepted_pattern_takes_little_time(pattern: str) -> None:
    assert recipe(freeze=pattern).freeze == pattern
    with within_budget(), pytest.raises(TrainingError, match="matches no parameter"):
        freeze_params({f"h_{i}": {"attn": {"c_attn": {"kernel": 0}}} for i in range(12)}, pattern)


@pytest.mark.parametrize("stacked", [False, True], ids=["layers", "stacked"])
def test_the_learning_rate_decays_from_the_top_layer_down(stacked: bool) -> None:
    """Of two layers, the upper one has the decayed rate, the lower one its square, and the embeddings its cube."""
    params = tree(stacked)
    updates, _ = scale_by_layer(0.5, 2).update(jax.tree.map(jnp.ones_like, params), optax.EmptyState())
    for name, array in bridge.to_torch(jax.tree.map(np.asarray, updates), MODEL).items():
        expected = {"ln_f": 1.0, "h.1": 0.5, "h.0": 0.25, "wte": 0.125, "wpe": 0.125}[
            name[: 4 if name[0] == "l" else 3]
        ]
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.thorough)])
def test_layer_decay_scales_the_whole_update_and_keeps_the_state(optimizer: Any) -> None:
    params = tree(stacked=True)
    settings = OptimizerConfig(optimizer=optimizer)
    whole, decayed = make_optimizer(settings, 9), make_optimizer(replace(settings, layer_decay=0.5), 9, n_layer=2)
    assert jax.tree.structure(whole.init(params)) == jax.tree.structure(decayed.init(params))

    @jax.jit
    def updates(params: Any) -> Any:
        return [tx.update(params, tx.init(params), params)[0] for tx in (whole, decayed)]

    full, scaled = updates(params)
    expected, _ = scale_by_layer(0.5, 2).update(full, optax.EmptyState())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), scaled, expected)
    with pytest.raises(ValueError, match="needs n_layer"):
        make_optimizer(replace(settings, layer_decay=0.5), 9)


# Early stopping


def test_a_run_ends_after_evaluations_without_improvement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt2_jax.training import loop

    losses = {0: 9.0, 1: 5.0, 2: 5.5, 3: 4.0, 4: 4.5, 5: 4.0, 6: 3.0}
    monkeypatch.setattr(
        loop, "validation_loss", lambda eval_step, config, data, state, mesh, check: losses[int(state.step)]
    )
    config = recipe(eval_every=1, early_stopping=2)
    outcome = run_in(tmp_path, config)
    assert (outcome.step, outcome.best_step, outcome.best_val_loss) == (5, 3, 4.0)
    assert outcome.stopped_by is None and steps(outcome.run) == [3, 5]
    before = files(outcome.run / "checkpoints")
    again = run_in(tmp_path, config, resume=True)
    assert (again.step, again.best_step) == (5, 3)
    assert files(outcome.run / "checkpoints") == before
    longer = run_in(tmp_path, replace(config, early_stopping=None), resume=True)
    assert (longer.step, longer.best_step) == (6, 6)

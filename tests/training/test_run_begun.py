"""Starting a run: where its directory may be, and its initial weights, sizes and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support.models import random_checkpoint
from support.training_runs import RECIPE, data_for, files, recipe, run_in, write_text

import bridge
from bridge import BridgeError, CheckpointError
from gpt2_jax.data import open_data
from gpt2_jax.parallel.sharding import make_mesh
from gpt2_jax.training import TrainConfig, TrainingError, loop, resolve_config
from gpt2_jax.training.run import directory as runs
from gpt2_jax.training.run.identity import Identity, stored_identity

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_a_run_does_not_start_in_an_existing_run(copy: Path) -> None:
    before = files(copy / "run")
    with pytest.raises(TrainingError, match="--resume"):
        run_in(copy, RECIPE)
    assert files(copy / "run") == before


@pytest.mark.parametrize("make", [lambda p: p.write_text("x"), lambda p: (p.mkdir(), (p / "notes").touch())])
def test_a_run_does_not_start_in_another_directory_or_file(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "run")
    before = files(tmp_path)
    with pytest.raises(TrainingError, match="is not a run"):
        run_in(tmp_path, RECIPE)
    assert {name: data for name, data in files(tmp_path).items() if name in before} == before


def test_a_run_without_validation_data_does_not_start(tmp_path: Path) -> None:
    data = open_data(write_text(tmp_path), tokenizer="bytes", validation_fraction=0, cache=tmp_path / "cache")
    with pytest.raises(TrainingError, match="no validation data"):
        loop.train(RECIPE, tmp_path / "run", data)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_without_checkpoints_starts_again(tmp_path: Path) -> None:
    first = recipe(tokenizer="characters", n_layer=3, vocab_size=50)
    data = data_for(first, tmp_path)
    runs.create(tmp_path / "run", resolve_config(first, data), data)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "val_loss": 1.0}\n')
    (tmp_path / "run" / "notes.txt").write_text("mine")
    again = data_for(RECIPE, tmp_path)
    before = files(tmp_path)
    with pytest.raises(TrainingError, match="is a run; continue it with --resume"):
        runs.create(tmp_path / "run", RECIPE, again)
    assert files(tmp_path) == before
    runs.create(tmp_path / "run", RECIPE, again, resume=True)
    assert stored_identity(tmp_path / "run") == Identity.of(RECIPE, again)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["n_layer"] == 2
    assert (tmp_path / "run" / "merges.txt").exists()  # the tokenizer of bytes, not that of characters
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("content", ["{}", '{"distance_km": 10}', "not JSON"])
def test_a_directory_with_another_programs_run_json_is_kept(tmp_path: Path, content: str, resume: bool) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(content)
    (tmp_path / "run" / "race.gpx").write_text("mine")
    before = files(tmp_path)
    with pytest.raises(BridgeError, match=r"run\.json"):
        runs.create(tmp_path / "run", RECIPE, data_for(RECIPE, tmp_path / "data"), resume=resume)
    assert {name: data for name, data in files(tmp_path).items() if name in before} == before
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json", "race.gpx"}


@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "config.json",
        ".lock",
        "metrics.jsonl",
        "loss.png",
        "wandb-id",
        "merges.txt",
        "checkpoints",
        "export",
    ],
)
@pytest.mark.parametrize("kind", ["link", "wrong kind"])
def test_a_run_whose_files_are_links_or_of_another_kind_is_not_resumed(copy: Path, name: str, kind: str) -> None:
    """Training would write outside the run through a link."""
    run, elsewhere = copy / "run", copy / "elsewhere"
    elsewhere.mkdir()
    if (run / name).exists():
        (run / name).rename(elsewhere / name)
    if kind == "link":
        (run / name).symlink_to(elsewhere / name)
    elif name in ("checkpoints", "export"):
        (run / name).write_text("a file")
    else:
        (run / name).mkdir()
    before = files(copy)
    with pytest.raises(BridgeError, match=r"not a regular|exists and is not a run|is a link|symbolic link|cannot read"):
        run_in(copy, RECIPE, resume=True)
    after = files(copy)
    assert {key: data for key, data in after.items() if not key.startswith("cache")} == {
        key: data for key, data in before.items() if not key.startswith("cache")
    }


def test_a_plot_of_another_program_is_kept(copy: Path) -> None:
    (copy / "run" / "loss.png").write_bytes(b"\x89PNG of somebody")
    said: list[object] = []
    loop.finish(copy / "run", {}, 6, None, said.append)
    assert (copy / "run" / "loss.png").read_bytes() == b"\x89PNG of somebody"
    assert any("loss.png" in str(line) and "is kept" in str(line) for line in said)


def test_a_run_is_removed_only_if_all_of_it_was_written_by_training(copy: Path) -> None:
    run = copy / "run"
    for name in ("notes.txt", "export/README.md", "checkpoints/6/notes.txt", "checkpoints/mine", "run.json.bak"):
        (run / name).write_text("mine")
        before = files(copy)
        with pytest.raises(TrainingError, match=f"not removed, because it holds files.*\n  - '{name}'"):
            runs.remove(run)
        assert files(copy) == before
        (run / name).unlink()
    runs.remove(run)
    assert not run.exists()


def test_a_checkpoint_that_another_process_saves_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process saved a checkpoint and was killed between this process's check and its lock."""
    data, run = data_for(RECIPE, tmp_path), tmp_path / "run"
    runs.create(run, RECIPE, data)
    lock = runs.exclusive_lock

    @contextmanager
    def late(path: Path, **options: bool) -> Iterator[bool | None]:
        (run / "checkpoints" / "3").mkdir(parents=True)
        with lock(path, **options) as locked:
            yield locked

    monkeypatch.setattr(runs, "exclusive_lock", late)
    with pytest.raises(TrainingError, match="is a run; continue it with --resume"):
        runs.create(run, RECIPE, data, resume=True)
    assert (run / "checkpoints" / "3").exists()


def test_a_run_that_another_process_starts_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, run, describe = data_for(RECIPE, tmp_path), tmp_path / "run", runs.write_description

    def another_first(directory: Path, *others: Any) -> None:
        describe(directory, *others)
        run.mkdir()
        (run / "run.json").write_text("theirs")

    monkeypatch.setattr(runs, "write_description", another_first)
    with pytest.raises(CheckpointError, match="exists; choose another name"):
        runs.create(run, RECIPE, data)
    assert files(run) == {"run.json": b"theirs"}


def test_a_directory_that_is_not_visible_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over NFS, a new directory may become visible late."""
    data, run, waited = data_for(RECIPE, tmp_path), tmp_path / "run", []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if sum(waited) == 30:
            runs.create(run, RECIPE, data)

    monkeypatch.setattr(runs.time, "sleep", wait)
    runs.wait_until_visible(run)
    assert sum(waited) == 30
    with pytest.raises(TrainingError, match="elsewhere' is not visible to this process; --out must be"):
        runs.wait_until_visible(tmp_path / "elsewhere")


def test_a_checkpoint_determines_weights_sizes_and_tokenizer_but_not_dropout(tmp_path: Path) -> None:
    source = random_checkpoint(
        bridge.GPT2Config(vocab_size=300, n_positions=14, n_embd=16, n_layer=1, n_head=2, attn_pdrop=0.5)
    )
    config = recipe(init_from="source", resid_pdrop=0.25)
    resolved = resolve_config(config, data_for(config, tmp_path), source)
    assert resolved.model == bridge.GPT2Config(**{**vars(source.config), "attn_pdrop": 0.0, "resid_pdrop": 0.25})
    model = loop.make_model(resolved)
    state = loop.initial_state(resolved, model, loop.make_optimizer(resolved.optimizer, 6), source, make_mesh())
    found = bridge.to_torch(jax.tree.map(np.asarray, state.params), resolved.model, vocab_multiple=128)
    assert all(np.array_equal(found[name], array) for name, array in source.tensors.items())


def test_a_run_has_the_files_beside_a_checkpoint_whose_tokenizer_is_inside(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    source = replace(random_checkpoint(RECIPE.model), own_tokenizer=bridge.byte_tokenizer, path=tmp_path / "source")
    carried = {"generation_config.json": b'{"top_k": 7}', "chat_template.jinja": b"{{ messages }}"}
    for name, content in carried.items():
        (tmp_path / "source" / name).write_bytes(content)
    runs.create(tmp_path / "run", RECIPE, data_for(RECIPE, tmp_path), init_from=source)
    assert files(tmp_path / "run").items() >= carried.items()


def test_without_a_checkpoint_the_vocabulary_is_that_of_the_tokenizer(tmp_path: Path) -> None:
    config = recipe(vocab_size=1000)
    assert resolve_config(config, data_for(config, tmp_path)).model.vocab_size == 257


def test_a_length_beyond_the_positions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="seq_len=17: the model has n_positions=16; choose --seq-len 16 or less"):
        resolve_config(recipe(seq_len=17), data_for(RECIPE, tmp_path))


def test_the_seed_draws_the_first_weights(tmp_path: Path) -> None:
    def embedding(config: TrainConfig) -> np.ndarray:
        model = loop.make_model(config)
        state = loop.initial_state(config, model, loop.make_optimizer(config.optimizer, 6), None, make_mesh())
        return np.array(state.params["wte"]["embedding"])

    assert np.array_equal(embedding(RECIPE), embedding(RECIPE))
    assert not np.array_equal(embedding(RECIPE), embedding(recipe(seed=1)))

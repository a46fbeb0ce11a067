"""Training runs, read as checkpoints without JAX."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.file_trees import tree
from support.models import random_state
from support.tokenizers_for_tests import write_byte_tokenizer
from test_import_boundaries import JAX, TORCH, assert_runs_without

import bridge
from bridge import CheckpointError, ConversionError, GPT2Config
from bridge.formats.directory import write_config
from bridge.formats.trainers import run as run_format
from bridge.storage import manifest
from gpt2_jax.cli import main
from gpt2_jax.training import OptimizerConfig, TrainState, make_optimizer
from gpt2_jax.training.run.checkpointing import Checkpoints

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = GPT2Config(vocab_size=257, n_positions=10, n_embd=12, n_layer=3, n_head=2, n_inner=20)
NO_BIASES = replace(CONFIG, bias=False)
UNTIED = replace(CONFIG, tie_word_embeddings=False)


def make_run(
    path: Path,
    config: GPT2Config = CONFIG,
    losses: dict[int, float | None] | None = None,
    *,
    stacked: bool = True,
    vocab_multiple: int = 1,
    ema: bool = False,
    optimizer: OptimizerConfig | None = None,
) -> Path:
    """Write a run. The weights of checkpoint N are made from seed N, their moving average from seed N + 100."""
    path.mkdir()
    write_config(path / "config.json", config)
    (path / "run.json").write_text("{}")
    write_byte_tokenizer(path)

    def tree(seed: int) -> object:
        state = bridge.to_flax(random_state(config, seed=seed), config, stacked=stacked, vocab_multiple=vocab_multiple)
        return jax.tree.map(jnp.array, state)

    with Checkpoints(path, keep_last=99) as checkpoints:
        for step, loss in (losses or {7: 1.0}).items():
            params = tree(step)
            moments = make_optimizer(optimizer or OptimizerConfig(), 10).init(params)  # type: ignore[arg-type]
            state = TrainState(jnp.int32(step), params, moments, tree(step + 100) if ema else None)
            checkpoints.save(state, loss)
    return path


def assert_weights(source: Path, config: GPT2Config, seed: int) -> None:
    found, expected = bridge.load(source), random_state(config, seed=seed)
    assert (found.format, found.config) == ("run", config)
    assert found.tensors.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found.tensors[name], array, err_msg=name)


@pytest.mark.parametrize("config", [CONFIG, NO_BIASES, UNTIED], ids=["plain", "no biases", "untied"])
@pytest.mark.parametrize(("stacked", "vocab_multiple"), [(True, 64), (False, 1)], ids=["stacked", "looped"])
def test_every_form_is_read_back_bit_for_bit(
    tmp_path: Path, config: GPT2Config, stacked: bool, vocab_multiple: int
) -> None:
    make_run(tmp_path / "run", config, stacked=stacked, vocab_multiple=vocab_multiple)
    assert_weights(tmp_path / "run", config, seed=7)
    assert bridge.load(tmp_path / "run").diagnostics == ("read from checkpoints/7",)
    assert bridge.load(tmp_path / "run").tokenizer().encode("hi") == [*b"hi"]


def test_the_moving_average_is_read(tmp_path: Path) -> None:
    make_run(tmp_path / "run", ema=True, vocab_multiple=64)
    assert_weights(tmp_path / "run", CONFIG, seed=107)


def test_a_run_is_read_as_its_best_checkpoint_and_each_can_be_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", losses={1: 3.0, 2: 1.5, 10: 2.0, 11: None})
    assert run_format.steps(run) == [1, 2, 10, 11]
    assert_weights(run, CONFIG, seed=2)
    for step in (1, 10, 11):
        assert_weights(run / "checkpoints" / str(step), CONFIG, seed=step)
    assert [run_format.validation_loss(run, step) for step in (1, 11)] == [3.0, None]


def test_the_source_of_a_run_is_the_checkpoint_that_was_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", losses={1: 3.0, 2: 1.5})
    assert bridge.load(run).source == run / "checkpoints" / "2"
    assert bridge.load(run / "checkpoints" / "1").source == run / "checkpoints" / "1"


@pytest.mark.parametrize(("stacked", "vocab_multiple"), [(True, 64), (False, 1)], ids=["stacked", "looped"])
def test_the_state_of_adamw_is_read_back(tmp_path: Path, stacked: bool, vocab_multiple: int) -> None:
    run = make_run(tmp_path / "run", stacked=stacked, vocab_multiple=vocab_multiple)
    state = run_format.adamw_state(run / "checkpoints" / "7", CONFIG)
    assert state is not None and state.step == 0
    for moment in (state.exp_avg, state.exp_avg_sq):
        assert {name: array.shape for name, array in moment.items()} == {
            p.torch_name: p.torch_shape for p in bridge.parameters(CONFIG)
        }


def test_a_state_of_muon_is_not_read_as_that_of_adamw(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", optimizer=OptimizerConfig(optimizer="muon"))
    assert run_format.adamw_state(run / "checkpoints" / "7", CONFIG) is None


def test_two_steps_of_a_run_can_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", losses={1: 3.0, 2: 1.5})
    for other, code, last in ((run / "checkpoints" / "1", 1, "Different: tensors."), (run, 0, "Identical: ")):
        with pytest.raises(SystemExit) as ended:
            main(["diff", str(run / "checkpoints" / "2"), str(other), "--no-function"])
        shown = capsys.readouterr().out
        assert ended.value.code == code
        assert f"  moments: {2 * len(bridge.parameters(CONFIG))} identical" in shown
        assert shown.splitlines()[-1].startswith(last)


def test_without_an_evaluation_a_run_is_read_as_its_newest_checkpoint(tmp_path: Path) -> None:
    assert_weights(make_run(tmp_path / "run", losses={9: None, 10: None}), CONFIG, seed=10)


def test_an_incomplete_checkpoint_is_not_listed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    shutil.copytree(run / "checkpoints" / "7", run / "checkpoints" / ".8.partial")
    shutil.copytree(run / "checkpoints" / "7", run / "checkpoints" / "9.damaged")
    assert run_format.steps(run) == [7]


@pytest.mark.parametrize("name", ["a b", "a%20b", "a#b?c", "ü"])
def test_special_characters_in_a_path_are_kept(tmp_path: Path, name: str) -> None:
    assert_weights(make_run(tmp_path / name), CONFIG, seed=7)


def test_a_run_is_read_without_a_framework(tmp_path: Path) -> None:
    make_run(tmp_path / "run", NO_BIASES, losses={7: 1.0, 8: 2.0}, vocab_multiple=64, ema=True)
    code = """
import bridge
run, target = sys.argv[2:4]
for source, name in ((run, "best"), (run + "/checkpoints/8", "named")):
    bridge.save(bridge.load(source).with_biases(), f"{target}/{name}", format="huggingface")
bridge.save(bridge.load(run), f"{target}/flax", format="flax")
"""
    assert_runs_without((*JAX, *TORCH, "orbax", "grain"), code, tmp_path / "run", tmp_path)
    for name, seed in (("best", 107), ("named", 108), ("flax", 107)):
        found = bridge.load(tmp_path / name)
        assert found.tokenizer().encode("hi") == [*b"hi"]
        for parameter, array in random_state(NO_BIASES, seed=seed).items():
            np.testing.assert_array_equal(found.tensors[parameter], array)


def test_convert_reads_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", NO_BIASES)

    def convert(*options: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(["convert", str(run), str(tmp_path / "out"), "--to", "huggingface", *options])
        return int(str(ended.value.code))

    assert convert() == 2
    assert "--zero-biases" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert convert("--zero-biases") == 0
    bridge.save(bridge.load(run).with_biases(), tmp_path / "export", format="huggingface")
    assert tree(tmp_path / "out") == tree(tmp_path / "export")
    converted = bridge.load(tmp_path / "out")
    zeros = [name for name, array in converted.tensors.items() if name.endswith("bias") and not array.any()]
    assert converted.config.bias
    assert len(zeros) == 6 * CONFIG.n_layer + 1


def test_a_run_is_not_overwritten_by_a_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before = tree(run)
    for target in (run, run / "checkpoints" / "7"):
        with pytest.raises(CheckpointError, match=r"not overwritten|is, or contains"):
            bridge.save(bridge.load(run), target, format="huggingface", overwrite=True)
    assert tree(run) == before


# Damaged runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, quick_compilation: None) -> Path:
    return make_run(tmp_path_factory.mktemp("whole") / "run", stacked=False)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", losses={1: 3.0, 2: 1.5, 3: 2.0})
    damaged = next(p for p in sorted((run / "checkpoints" / "2" / "state").rglob("*")) if p.stat().st_size > 1000)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert_weights(run, CONFIG, seed=3)
    assert bridge.load(run).diagnostics == (
        "read from checkpoints/3",
        f"the checkpoint of step 2 is damaged and was skipped: '{damaged}' was changed after it was written",
    )
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        bridge.load(run / "checkpoints" / "2")
    assert damaged.read_bytes() == data, "the file is unchanged"


def test_a_checkpoint_with_a_damaged_manifest_is_named_too(tmp_path: Path) -> None:
    """Its loss is unknown, so it may have been the best."""
    run = make_run(tmp_path / "run", losses={1: 3.0, 2: 1.5, 3: 2.0})
    for step in (1, 2):
        (run / "checkpoints" / str(step) / "manifest.json").unlink()
    assert_weights(run, CONFIG, seed=3)
    assert [line.partition(" is damaged")[0] for line in bridge.load(run).diagnostics] == [
        "read from checkpoints/3",
        "the checkpoint of step 2",
        "the checkpoint of step 1",
    ]


def test_the_error_for_a_run_without_valid_checkpoints_names_each(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", losses={1: 3.0, 2: 1.5})
    (run / "checkpoints" / "1" / "manifest.json").unlink()
    shutil.rmtree(run / "checkpoints" / "2" / "state")
    with pytest.raises(CheckpointError, match=r"(?s)no valid checkpoint:.*step 1 is damaged.*step 2 is damaged"):
        bridge.load(run)


def test_a_checkpoint_that_is_removed_while_it_is_read_is_an_error_and_not_zeros(copy: Path) -> None:
    """Training may remove an older checkpoint meanwhile. The next test shows that arrays of zeros are read."""
    tensors = bridge.load(copy).tensors
    assert tensors["wte.weight"].any()
    shutil.rmtree(copy / "checkpoints")
    for name in tensors:
        with pytest.raises(CheckpointError, match="another checkpoint"):
            tensors[name]


def test_weights_that_are_zero_are_read_as_zero(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", losses={7: 1.0})
    zeros = jax.tree.map(jnp.zeros_like, bridge.to_flax(random_state(CONFIG, seed=7), CONFIG, stacked=True))
    with Checkpoints(run, keep_last=9) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(8), zeros, {"count": jnp.int32(3)}), 0.5)
    assert not any(array.any() for array in bridge.load(run).tensors.values())


def test_a_checkpoint_with_a_read_error_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", losses={1: 3.0, 2: 1.5})
    inner = manifest._sha256

    def read(path: Path, from_disk: bool = False) -> str:
        if "checkpoints/2/" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return inner(path, from_disk)

    monkeypatch.setattr(manifest, "_sha256", read)
    assert_weights(run, CONFIG, seed=1)
    with pytest.raises(CheckpointError, match="Input/output error"):
        bridge.load(run / "checkpoints" / "2")


def test_a_checkpoint_under_another_number_is_skipped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", losses={1: 3.0, 2: 1.5})
    (run / "checkpoints" / "2").rename(run / "checkpoints" / "5")
    assert_weights(run, CONFIG, seed=1)
    with pytest.raises(CheckpointError, match="is the checkpoint of step '2'"):
        bridge.load(run / "checkpoints" / "5")


@pytest.mark.parametrize("step", [True, "2", 2.0, None, 10**400, -2, "\x1b[31m"])
def test_a_step_of_another_type_is_refused(copy: Path, step: Any) -> None:
    path = copy / "checkpoints" / "7"
    path = path.rename(path.with_name("1"))
    manifest.commit(path, {"step": step, "val_loss": 1.0})
    for source, message in ((copy, "no valid checkpoint"), (path, "is the checkpoint of step")):
        with pytest.raises(CheckpointError, match=message) as error:
            bridge.load(source)
        assert str(error.value).replace("\n", "").isprintable() and len(str(error.value)) < 2000


@pytest.mark.parametrize("loss", ["x", True, float("nan"), float("inf"), 10**400, [1], {}])
def test_a_loss_that_is_not_a_number_counts_as_missing(copy: Path, loss: Any) -> None:
    manifest.commit(copy / "checkpoints" / "7", {"step": 7, "val_loss": loss})
    assert run_format.validation_loss(copy, 7) is None
    assert_weights(copy, CONFIG, seed=7)


def test_a_store_without_weights_is_a_checkpoint_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with Checkpoints(run, keep_last=9) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(8), {}, {"count": jnp.int32(3)}), 0.5)
    with pytest.raises(CheckpointError, match="holds no weights"):
        bridge.load(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_inner": 24}, r"h_0/mlp/c_fc/kernel has shape \(12, 20\); the configuration requires \(12, 24\)"),
        ({"n_layer": 4}, "h_3/ln_1/scale is missing"),
        ({"n_layer": 2}, "'h_2/ln_1/scale' is not a parameter"),
        ({"vocab_size": 300}, r"wte/embedding has shape \(257, 12\); the configuration requires \(300, 12\)"),
        ({"tie_word_embeddings": False}, "lm_head/embedding is missing"),
    ],
)
def test_weights_of_another_shape_are_a_conversion_error(copy: Path, change: dict[str, int], message: str) -> None:
    fields = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**fields, **change}))
    with pytest.raises(ConversionError, match=message):
        bridge.load(copy)


def test_a_run_without_a_checkpoint_says_so(copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    (copy / "run.json").write_text('{"version": 1, "config": {}, "data": "x"}')
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        bridge.load(copy)
    with pytest.raises(CheckpointError, match="does not exist"):
        bridge.load(copy / "checkpoints" / "7")


def test_linked_checkpoints_are_refused(copy: Path) -> None:
    (copy / "checkpoints").rename(copy / "elsewhere")
    (copy / "checkpoints").symlink_to("elsewhere")
    for source in (copy, copy / "checkpoints" / "7"):
        with pytest.raises(CheckpointError, match="checkpoints' is a link; the checkpoints of a run must be in its"):
            bridge.load(source)


@pytest.mark.parametrize("name", ["run.json", "config.json"])
def test_a_directory_without_its_description_is_not_a_run(copy: Path, name: str) -> None:
    (copy / name).unlink()
    for source in (copy, copy / "checkpoints" / "7"):
        with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
            bridge.load(source)

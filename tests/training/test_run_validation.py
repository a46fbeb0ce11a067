"""The validation loss: its weights and its batches."""

from __future__ import annotations

import io
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from support.training_runs import RECIPE, data_for, recipe, records, write_text

from gpt2_jax.data import Data, open_data
from gpt2_jax.parallel.sharding import make_mesh
from gpt2_jax.training import TrainingError, loop, resolve_config, train
from gpt2_jax.training.config import TrainConfig, validation_sets
from gpt2_jax.training.run.identity import run_arguments


def test_the_moving_average_is_evaluated(tmp_path: Path) -> None:
    state = loop.TrainState(jax.numpy.int32(1), "weights", None, "their mean")
    seen = []

    def eval_step(params: Any, batch: Any, frozen: Any) -> tuple[float, int]:
        seen.append(params)
        return 1.0, 2

    data, mesh = data_for(RECIPE, tmp_path), make_mesh()
    assert loop.validation_loss(eval_step, RECIPE, data, state, mesh) == 0.5
    assert loop.validation_loss(eval_step, RECIPE, data, state._replace(ema_params=None), mesh) == 0.5
    assert set(seen) == {"their mean", "weights"}


def test_validation_data_without_a_label_is_an_error(tmp_path: Path) -> None:
    state = loop.TrainState(jax.numpy.int32(0), {}, {})
    with pytest.raises(TrainingError, match="nothing to predict"):
        loop.validation_loss(
            lambda params, batch, frozen: (0.0, 0), RECIPE, data_for(RECIPE, tmp_path), state, make_mesh()
        )


def test_the_error_for_windows_without_completions_names_the_length(tmp_path: Path) -> None:
    records = tmp_path / "pairs.jsonl"
    records.write_text(f'{{"prompt": "{"a" * 300}", "completion": "b"}}\n' * 2)
    data = open_data(records, tokenizer=RECIPE.tokenizer, cache=tmp_path / "cache", validation_fraction=0.5)
    state = loop.TrainState(jax.numpy.int32(0), {}, {})
    config = recipe(examples="stream", eval_batches=1)
    with pytest.raises(TrainingError, match=r"none of its windows of seq_len=12 tokens has a token.*--seq-len"):
        loop.validation_loss(lambda params, batch, frozen: (0.0, 0), config, data, state, make_mesh())


def test_an_evaluation_batch_has_the_rows_of_a_microbatch(tmp_path: Path) -> None:
    """A batch that is trained in 40 microbatches does not fit on a device at once. The windows stay the same."""
    seen = []

    def eval_step(params: Any, batch: Any, frozen: Any) -> tuple[float, int]:
        seen.append(batch["input_ids"])
        return 1.0, 1

    data, state = data_for(RECIPE, tmp_path), loop.TrainState(jax.numpy.int32(0), {}, {})
    for num_microbatches in (1, 2):
        loop.validation_loss(eval_step, recipe(num_microbatches=num_microbatches), data, state, make_mesh())
    assert [len(ids) for ids in seen] == [4, 4, 2, 2, 2, 2]
    np.testing.assert_array_equal(np.concatenate(seen[:2]), np.concatenate(seen[2:]))


# Several sets


def data_with_sets(directory: Path) -> Data:
    """A set of 1201 tokens and one of 1651, with the end of the text."""
    paths = {name: str(directory / f"{name}.txt") for name in ("words", "digits")}
    Path(paths["words"]).write_text("other words and more of them, " * 40)
    Path(paths["digits"]).write_text("31415926535897932384626433832795 " * 50)
    return open_data(write_text(directory), tokenizer="bytes", validation=paths, cache=directory / "cache")


def loss_by_length(eval_step: Any, config: Any, data: Data, state: Any, mesh: Any, check: Any) -> float:
    """A validation loss that tells the sets and the steps apart."""
    assert data.validation is not None
    return float(len(data.validation) - int(state.step))


def test_each_set_is_evaluated_and_the_first_decides(
    tmp_path: Path, quick_compilation: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_with_sets(tmp_path)
    assert data.validation is data.validation_sets["words"]
    assert [len(stream) for stream in data.validation_sets.values()] == [1201, 1651]
    monkeypatch.setattr(loop, "validation_loss", loss_by_length)
    config, said = recipe(max_steps=2, eval_every=2), io.StringIO()
    outcome = train(resolve_config(config, data), tmp_path / "run", data, console=Console(file=said, width=200))
    losses = [{name: r[name] for name in r if "val" in name} for r in records(tmp_path / "run")]
    assert losses == [
        {"val_loss": 1201.0, "val_loss/words": 1201.0, "val_loss/digits": 1651.0},
        {"val_loss": 1199.0, "val_loss/words": 1199.0, "val_loss/digits": 1649.0},
    ]
    assert outcome.best_val_loss == 1199.0
    assert "validation loss 1199.0000 (words 1199.0000, digits 1649.0000)" in said.getvalue()


def test_an_evaluation_that_a_signal_ends_between_two_sets_is_repeated(
    tmp_path: Path, quick_compilation: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run = data_with_sets(tmp_path), tmp_path / "run"
    config = resolve_config(recipe(max_steps=2, eval_every=1), data)

    def interrupted(*args: Any) -> float:
        *_, of, state, _, check = args
        if of.validation is data.validation_sets["digits"] and int(state.step) == 1:
            signal.raise_signal(signal.SIGTERM)
            check()
        return loss_by_length(*args)

    monkeypatch.setattr(loop, "validation_loss", interrupted)
    outcome = train(config, run, data, console=Console(file=io.StringIO()))
    assert (outcome.step, outcome.stopped_by, outcome.best_val_loss) == (1, signal.SIGTERM, None)
    assert [[name for name in r if "val" in name] for r in records(run)][1:] in ([], [[]])
    monkeypatch.setattr(loop, "validation_loss", loss_by_length)
    assert train(config, run, data, resume=True, console=Console(file=io.StringIO())).best_val_loss == 1199.0
    assert [(r["step"], r["val_loss/words"], r["val_loss/digits"]) for r in records(run)] == [
        (0, 1201.0, 1651.0),
        (1, 1200.0, 1650.0),
        (2, 1199.0, 1649.0),
    ]


def test_a_process_with_fewer_sets_is_found(tmp_path: Path) -> None:
    data = data_with_sets(tmp_path)
    fewer = replace(data, validation_sets={"words": data.validation_sets["words"]})
    ours, theirs = run_arguments(RECIPE, data), run_arguments(RECIPE, fewer)
    assert {name for name in ours if ours[name] != theirs[name]} == {"data"}


def test_sets_are_named_in_the_configuration() -> None:
    assert validation_sets(()) == {}
    assert validation_sets(("text.txt",)) == {"": "text.txt"}
    assert validation_sets(("dir/a=b.txt",)) == {"": "dir/a=b.txt"}
    assert validation_sets(("news=a.txt", "code=b=c.txt")) == {"news": "a.txt", "code": "b=c.txt"}
    assert recipe(validation_data=["news=a.txt"]).validation_data == ("news=a.txt",)
    assert TrainConfig(validation_data="a.txt") == TrainConfig(validation_data=("a.txt",))  # type: ignore[arg-type]
    assert TrainConfig(validation_data=None) == TrainConfig()  # type: ignore[arg-type]
    assert replace(TrainConfig(), validation_data="a.txt").validation_data == ("a.txt",)
    for sets in (["a.txt", "b.txt"], ["news=a.txt", "b.txt"], ["news=a.txt", "news=b.txt"]):
        with pytest.raises(TrainingError, match="several sets need different names, as NAME=PATH"):
            recipe(validation_data=sets)

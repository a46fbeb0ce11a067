"""The samples printed during a run, and their prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.models import random_checkpoint
from support.training_runs import data_for, recipe, run_in

import bridge
from gpt2_jax.data import open_data
from gpt2_jax.parallel.sharding import make_mesh
from gpt2_jax.training import TrainingError, loop, resolve_config
from gpt2_jax.training.run.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_prompt": ""}, "has 0 tokens"),
        ({"sample_prompt": "x" * 16}, "has 16 tokens"),
        ({"sample_prompt": "é", "tokenizer": "characters"}, "no character 'é'"),
    ],
)
def test_an_invalid_prompt_is_found_before_the_run_starts(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=f"sample_prompt=.*{message}"):
        run_in(tmp_path, recipe(sample_tokens=3, **changes))
    assert not (tmp_path / "run").exists()
    assert resolve_config(
        recipe(**changes), data_for(recipe(**changes), tmp_path)
    )  # without samples, the prompt is not used


def test_a_run_on_documents_with_masks_learns_and_prints_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i:02}.txt").write_text("abcdef " * (i % 7 + 1))
    config = recipe(data=str(texts), examples="documents", sample_tokens=5, sample_prompt="abc", learning_rate=3e-2)
    data = open_data(texts, tokenizer="bytes", cache=tmp_path / "cache")
    outcome = loop.train(resolve_config(config, data), tmp_path / "run", data)
    kept = read_metrics(outcome.run)
    assert kept[-1]["val_loss"] < kept[0]["val_loss"]
    shown = capsys.readouterr().out
    assert [shown.count(f"sample after step {step}:\nabc") for step in (4, 6)] == [1, 1]  # at the evaluations
    assert "validation loss" in shown


def test_a_sample_with_a_padded_vocabulary_has_only_known_tokens(tmp_path: Path) -> None:
    """The model has ids that the tokenizer lacks, as in a checkpoint with a vocabulary padded to a multiple of 64."""
    model = bridge.GPT2Config(vocab_size=1000, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    config = recipe(init_from="memory", **vars(model), sample_tokens=15)
    data = data_for(config, tmp_path)
    resolved = resolve_config(config, data, random_checkpoint(model))
    gpt2 = loop.make_model(resolved)
    state = loop.initial_state(
        resolved, gpt2, loop.make_optimizer(resolved.optimizer, 6), random_checkpoint(model), make_mesh()
    )
    shown = loop.sample(resolved, gpt2, state, data, [65, 27, 10])
    assert shown.startswith("A\ufffd\n")  # an escape would move the terminal's cursor
    assert data.tokenizer is not None and data.tokenizer.token_of(999) is None

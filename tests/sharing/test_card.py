"""The model card: its metadata, what it says, and what it leaves out."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from support.models import SMALLEST, TINY

from gpt2_jax.sharing import EvaluationFacts, ModelFacts, RunFacts, is_own_card, model_card
from gpt2_jax.training import OptimizerConfig, TrainConfig

yaml = pytest.importorskip("yaml")

FACTS = ModelFacts("apache-2.0", TINY, ("float32",), "f" * 64, "byte-level BPE, 257 ids")
CONFIG = TrainConfig(
    model=replace(SMALLEST, n_positions=12),
    optimizer=OptimizerConfig(learning_rate=2e-3, min_learning_rate=1e-4),
    data="/home/me/secret diary.txt",
    sample_prompt="a private prompt",
    wandb="my-project",
    max_steps=40,
    batch_size=4,
    seq_len=10,
)
LOSSES = [{"step": k, "train_loss": 5 - k / 10} | ({"val_loss": 5.5 - k / 10} if k % 2 == 0 else {}) for k in range(41)]
RUN = RunFacts(CONFIG, "d" * 64, 30, 2.5, LOSSES[:31])
EVALUATION = EvaluationFacts(
    "input.txt", {"loss": 2.25, "perplexity": 9.4877, "bits_per_byte": 1.5}, {"tokens": 100, "predicted_tokens": 99}
)


def metadata(card: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)^---\n", card, re.DOTALL | re.MULTILINE)
    assert found is not None
    return yaml.safe_load(found[1])


def test_a_model_without_a_history_states_itself() -> None:
    card = model_card("me/mine", FACTS)
    assert metadata(card) == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2", "gpt2-bridge"],
    }
    assert "# mine\n" in card and 'pipeline("text-generation", "me/mine")' in card
    assert f"`{'f' * 64}`" in card and "byte-level BPE, 257 ids" in card
    for section in ("## Training", "## Evaluation", "## Parity"):
        assert section not in card


def test_the_metadata_has_the_results() -> None:
    found = metadata(model_card("me/mine", replace(FACTS, run=RUN, evaluation=EVALUATION)))
    (model,) = found["model-index"]
    assert model["name"] == "mine"
    evaluated, validated = model["results"]
    assert evaluated["task"] == validated["task"] == {"type": "text-generation"}
    assert evaluated["dataset"] == {"name": "input.txt", "type": "text"}
    assert {m["type"]: m["value"] for m in evaluated["metrics"]} == EVALUATION.metrics
    assert validated["metrics"] == [{"type": "loss", "name": "loss, nats per token", "value": 2.5}]


def test_the_hubs_own_parser_reads_the_results() -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    card = huggingface_hub.ModelCard(model_card("me/mine", replace(FACTS, run=RUN, evaluation=EVALUATION)))
    assert card.data.license == "apache-2.0"
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert found["input.txt", "perplexity"] == 9.4877
    assert found["validation part of the training data", "loss"] == 2.5


def test_the_recipe_and_the_losses_are_in_the_card() -> None:
    card = model_card("me/mine", replace(FACTS, run=RUN))
    for row in ("| learning_rate | `0.002` |", "| batch_size | `4` |", "| schedule | `cosine` |"):
        assert row in card
    assert "step 30, after batches with 1,200 tokens. Its validation loss is 2.5000" in card
    assert f"`{'d' * 64}`" in card
    table = card[card.index("### Losses") :]
    steps = [int(step) for step in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)]
    assert steps[0] == 0 and steps[-1] == 30 and len(steps) == 10
    assert "| 0 | 5 | 5.5 |" in table and "| 30 | 2 | 2.5 |" in table


def test_paths_prompts_and_projects_are_not_published() -> None:
    card = model_card("me/mine", replace(FACTS, run=RUN))
    for private in ("secret", "diary", "/home", "private prompt", "my-project"):
        assert private not in card


def test_a_run_without_validation_shows_the_training_loss() -> None:
    run = replace(RUN, val_loss=None, losses=[{"step": k, "train_loss": 5.0} for k in range(3)])
    card = model_card("me/mine", replace(FACTS, run=run))
    assert "model-index" not in metadata(card)
    assert "| step | train loss |" in card and "validation loss is" not in card


def test_names_from_files_cannot_change_the_card() -> None:
    evaluation = replace(EVALUATION, data="a`|<script>\n# x\u202e[y](z)")
    card = model_card("me/mine", replace(FACTS, evaluation=evaluation))
    assert "<script>" not in card.split("---\n")[1]
    assert "\n# x" not in card and "\u202e" not in card and "](z)" not in card.split("---\n")[1]
    assert metadata(card)["model-index"][0]["results"][0]["dataset"]["type"] == "text"


def test_only_own_cards_are_recognised() -> None:
    assert is_own_card(model_card("me/mine", FACTS))
    assert not is_own_card("---\nlicense: mit\n---\n# mine\n")

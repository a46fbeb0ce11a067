"""The model card: its metadata, what it says, and what it leaves out."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from support.models import SMALLEST, TINY

from gpt2_jax.lora.config import LoRAConfig
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


def trained_with(**changes: Any) -> str:
    return model_card("me/mine", replace(FACTS, run=replace(RUN, config=replace(CONFIG, **changes))))


def test_the_card_of_an_adapter_says_so() -> None:
    card = trained_with(lora=LoRAConfig(rank=4, alpha=8.0, dropout=0.1), early_stopping=3)
    assert ", from the weights of another checkpoint. Only an adapter was trained." in card
    for row in ("lora_rank | `4`", "lora_alpha | `8`", "lora_targets | `c_attn`", "lora_dropout | `0.1`"):
        assert f"| {row} |" in card
    assert "| lora_rslora | `False` |" in card and "| early_stopping | `3` |" in card


def test_the_card_of_a_partial_run_says_so() -> None:
    optimizer = OptimizerConfig(schedule="wsd", decay_fraction=0.3, layer_decay=0.8)
    card = trained_with(freeze=r"wte|h_\d+/attn", optimizer=optimizer)
    assert "Only a part of the weights was trained." in card
    assert r"| freeze | `wte\|h_\d+/attn` |" in card  # GitHub shows the escaped bar without its backslash
    assert "| decay_fraction | `0.3` |" in card and "| layer_decay | `0.8` |" in card
    assert "| decay_steps | `300` |" in trained_with(optimizer=OptimizerConfig(decay_steps=300))


def test_settings_without_an_effect_are_left_out() -> None:
    card = model_card("me/mine", replace(FACTS, run=RUN))
    for name in ("lora", "freeze", "layer_decay", "early_stopping", "decay_steps", "decay_fraction", "Only a"):
        assert name not in card


def test_the_card_says_only_what_is_known_about_the_start() -> None:
    """`train` takes a checkpoint that the configuration does not name."""
    unknown = trained_with()
    assert "of gpt2-bridge. This is the checkpoint" in unknown and "random" not in unknown
    assert ", from the weights of another checkpoint. This is" in trained_with(init_from="/home/me/secret")
    assert "secret" not in trained_with(init_from="/home/me/secret")


def test_separate_validation_data_is_not_called_a_part_of_the_training_data() -> None:
    (model,) = metadata(trained_with(validation_data=("wiki=/home/me/secret.txt",)))["model-index"]
    assert model["results"][0]["dataset"]["name"] == "separate validation data"
    assert "secret" not in trained_with(validation_data=("wiki=/home/me/secret.txt",))


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

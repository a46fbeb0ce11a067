"""The comparison of configurations, generation settings, chat templates, tokenizers and optimizer states."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.models import SMALLEST, huggingface_directory, random_checkpoint
from support.tokenizers_for_tests import write_byte_tokenizer

import bridge
from bridge import Checkpoint, CheckpointError, GPT2Config, TokenizerError
from bridge.comparison import Difference, compare
from bridge.comparison.settings import compare_configs
from bridge.optimizer_state import AdamWState, Hyperparameters
from bridge.storage.tensors import LazyTensor, LazyTensorMap

CONFIG = replace(SMALLEST, vocab_size=260)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = huggingface_directory(tmp_path / "model", CONFIG)
    write_byte_tokenizer(path)
    return path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = huggingface_directory(tmp_path / "other", CONFIG)
    write_byte_tokenizer(path)
    return path


def edit(file: Path, **changes: object) -> None:
    fields = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**fields, **changes}))


EFFECTS = {
    "layer_norm_epsilon": (1e-6, "function"),
    "n_head": (4, "function"),
    "activation_function": ("gelu", "function"),
    "scale_attn_weights": (False, "function"),
    "scale_attn_by_inverse_layer_idx": (True, "function"),
    "reorder_and_upcast_attn": (True, "rounding"),
    "resid_pdrop": (0.1, "training"),
    "initializer_range": (0.1, "training"),
    "n_layer": (3, "tensors"),
    "vocab_size": (5, "tensors"),
    "tie_word_embeddings": (False, "tensors"),
    "bias": (False, "tensors"),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_a_field_is_named_with_what_it_changes(name: str) -> None:
    value, effect = EFFECTS[name]
    changed = replace(SMALLEST, **{name: value})  # type: ignore[arg-type]
    assert compare_configs(SMALLEST, changed) == (Difference(name, getattr(SMALLEST, name), value, effect),)  # type: ignore[arg-type]


def test_two_spellings_of_one_function_are_recognised() -> None:
    wide = replace(SMALLEST, n_inner=None)
    [size] = compare_configs(wide, replace(wide, n_inner=4 * wide.n_embd))
    [tanh] = compare_configs(SMALLEST, replace(SMALLEST, activation_function="gelu_pytorch_tanh"))
    assert (size.effect, tanh.effect) == ("none", "rounding")
    assert not size.matters and not tanh.matters


def test_every_field_of_the_configuration_has_an_effect() -> None:
    for name in GPT2Config.__dataclass_fields__:
        assert name in EFFECTS or name in ("n_positions", "n_embd", "n_inner", "embd_pdrop", "attn_pdrop")


def test_a_copy_is_identical(model: Path, other: Path) -> None:
    found = compare(bridge.load(model), bridge.load(other))
    assert found.is_identical and found.different_parts == ()


def test_a_dropout_rate_is_a_difference_that_changes_no_part(model: Path, other: Path) -> None:
    edit(other / "config.json", resid_pdrop=0.5, _name_or_path="x")
    found = compare(bridge.load(model), bridge.load(other))
    assert found.has_identical_model and not found.is_identical
    assert found.different_parts == ()
    assert [difference.name for difference in found.extra] == ["_name_or_path"]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"do_sample": True, "temperature": 0.5}, {"do_sample", "temperature"}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty"}),
        ({"max_new_tokens": 3}, {"max_new_tokens"}),
        ({"eos_token_id": 7}, {"eos_token_id"}),
        ({"do_sample": False, "num_beams": 1, "top_p": 1.0, "top_k": 50, "temperature": 1.0}, set()),
    ],
)
def test_generation_settings_differ_from_the_defaults(
    settings: dict[str, object], names: set[str], model: Path, other: Path
) -> None:
    (other / "generation_config.json").write_text(json.dumps(settings))
    found = compare(bridge.load(model), bridge.load(other))
    assert {difference.name for difference in found.generation} == names
    assert found.different_parts == (("generation settings",) if names else ())


def test_a_setting_that_is_not_applied_is_listed_but_changes_nothing(model: Path, other: Path) -> None:
    (other / "generation_config.json").write_text(json.dumps({"penalty_alpha": 0.6}))
    found = compare(bridge.load(model), bridge.load(other))
    assert [difference.effect for difference in found.generation] == ["none"]
    assert found.different_parts == ()


def test_chat_templates_differ_by_name(model: Path, other: Path) -> None:
    (model / "chat_template.jinja").write_text("one")
    (other / "chat_template.jinja").write_text("another")
    (other / "additional_chat_templates").mkdir()
    (other / "additional_chat_templates" / "tools.jinja").write_text("tools")
    found = compare(bridge.load(model), bridge.load(other))
    assert {difference.name: difference.a is None for difference in found.chat_templates} == {
        "default": False,
        "tools": True,
    }
    assert found.different_parts == ("chat templates",)


def test_another_end_of_sequence_token_is_named(model: Path, other: Path) -> None:
    edit(other / "tokenizer_config.json", eos_token="!", pad_token="~")
    found = compare(bridge.load(model), bridge.load(other))
    named = {difference.name for difference in found.tokenizer.differences}
    assert {"eos token", "pad token"} <= named
    assert "tokenizer" in found.different_parts and "generation settings" in found.different_parts


def test_other_merges_are_named_with_strings_and_tokens(tmp_path: Path) -> None:
    bundled = bridge.load("bundled")
    bridge.save(bundled, tmp_path / "other", format="huggingface")
    header, *merges = (tmp_path / "other" / "merges.txt").read_text().splitlines()
    (tmp_path / "other" / "merges.txt").write_text("\n".join([header, *reversed(merges)]) + "\n")
    found = compare(bundled, bridge.load(tmp_path / "other")).tokenizer
    assert not found.is_same_definition and found.is_different
    assert found.strings > 40
    assert found.different_strings
    assert all(" in A, " in sentence for sentence in found.different_strings)


def test_a_tokenizer_on_one_side_is_not_compared(model: Path, tmp_path: Path) -> None:
    bare = huggingface_directory(tmp_path / "bare", CONFIG)
    found = compare(bridge.load(model), bridge.load(bare))
    assert [*found.tokenizer.missing] == ["B"]
    assert found.tokenizer.tokenizers is None
    assert found.is_identical


def test_damaged_companions_are_an_error(model: Path, other: Path) -> None:
    (other / "generation_config.json").write_text('{"temperature": "hot"}')
    with pytest.raises(CheckpointError, match="temperature"):
        compare(bridge.load(model), bridge.load(other))
    (other / "generation_config.json").unlink()
    (other / "vocab.json").write_text("[")
    with pytest.raises(TokenizerError, match=r"vocab\.json"):
        compare(bridge.load(model), bridge.load(other))


def with_optimizer(step: int = 3, change: float = 0.0, learning_rate: float = 1e-3) -> Checkpoint:
    checkpoint = random_checkpoint(SMALLEST)
    moments = {name: array * 0.5 for name, array in checkpoint.tensors.items()}
    changed = {**moments, "ln_f.bias": moments["ln_f.bias"] + np.float32(change)}
    hyperparameters = dict.fromkeys(moments, Hyperparameters(learning_rate, 0.9, 0.95, 1e-8, 0.1))
    return replace(checkpoint, optimizer=AdamWState(step, moments, changed, hyperparameters))


def test_states_of_adamw_are_compared_by_step_hyperparameters_and_moments() -> None:
    same = compare(with_optimizer(), with_optimizer())
    assert same.is_identical and same.optimizer.is_compared
    found = compare(with_optimizer(), with_optimizer(step=4, change=0.25, learning_rate=2e-3)).optimizer
    count = len(bridge.parameters(SMALLEST))
    assert [(d.name, d.a, d.b) for d in found.differences] == [
        ("step", 3, 4),
        (f"learning_rate of {count} parameters", 1e-3, 2e-3),
    ]
    [tensor] = [tensor for tensor in found.tensors if tensor.status != "identical"]
    assert tensor.name == "exp_avg_sq of ln_f.bias"
    assert tensor.values.largest == pytest.approx(0.25)


def test_a_state_on_one_side_is_not_a_difference() -> None:
    found = compare(with_optimizer(), random_checkpoint(SMALLEST))
    assert found.optimizer.missing == ("B",)
    assert found.is_identical


def test_the_states_of_runs_are_compared() -> None:
    run = bridge.load(Path(__file__).parents[2] / "files" / "run-0.1.0")
    found = compare(run, run)
    assert found.is_identical
    assert len(found.optimizer.tensors) == 2 * len(run.tensors)


def test_a_damaged_tensor_is_an_error() -> None:
    def read() -> np.ndarray:
        raise CheckpointError("the file changed")

    checkpoint = random_checkpoint(SMALLEST)
    wte = checkpoint.tensors.entries["wte.weight"]
    damaged = {**checkpoint.tensors.entries, "wte.weight": LazyTensor(wte.dtype, wte.shape, read)}
    with pytest.raises(CheckpointError, match="the file changed"):
        compare(checkpoint, replace(checkpoint, tensors=LazyTensorMap(damaged)))


def test_a_flag_of_an_added_token_is_named_even_if_its_beginning_is_that_of_another(model: Path, other: Path) -> None:
    tokens = ["<" + "x" * 100 + "1>", "<" + "x" * 100 + "2>"]
    for directory, special in ((model, [True, True]), (other, [False, True])):
        added = {
            str(257 + i): {"content": token, "special": is_special, "normalized": False}
            for i, (token, is_special) in enumerate(zip(tokens, special, strict=True))
        }
        (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    found = compare(bridge.load(model), bridge.load(other)).tokenizer
    assert found.is_same_definition
    assert [(d.name, d.a, d.b) for d in found.differences] == [
        (f"added token {tokens[0]}", "id 257, special", "id 257")
    ]

"""The comparison of two functions: logits and hidden states of models that are equal, almost equal and different."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from support.models import SMALLEST, huggingface_directory, random_checkpoint, random_state
from support.tokenizers_for_tests import write_byte_tokenizer

import bridge
from bridge import BridgeError, Checkpoint, NoTokenizerError
from bridge.errors import quoted
from gpt2_jax.diff import Diff, FunctionComparison, compare_functions, diff

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = replace(SMALLEST, vocab_size=260, n_positions=16)
ORIGINAL = random_checkpoint(CONFIG)


def compared(other: Checkpoint, original: Checkpoint = ORIGINAL, **options: object) -> FunctionComparison:
    found = compare_functions(original, other, batch_size=2, seq_len=8, **options)  # type: ignore[arg-type]
    assert isinstance(found, FunctionComparison)
    return found


def with_swapped_heads() -> Checkpoint:
    state = random_state(CONFIG)
    D, H, K = CONFIG.n_embd, CONFIG.n_head, CONFIG.head_size
    for name, axis, shape in (
        ("c_attn.weight", 2, (D, 3, H, K)),
        ("c_attn.bias", 1, (3, H, K)),
        ("c_proj.weight", 0, (H, K, D)),
    ):
        array = state[f"h.0.attn.{name}"]
        state[f"h.0.attn.{name}"] = np.flip(array.reshape(shape), axis).reshape(array.shape)
    return Checkpoint.of(state, CONFIG)


def test_permuted_heads_agree_within_rounding() -> None:
    result = diff(ORIGINAL, with_swapped_heads(), seq_len=8)
    assert result.verdict == "same function"
    assert result.function is not None and result.function.is_within_rounding
    assert result.function.first_departure is None
    assert [*result.function.hidden_states] == ["drop", "h.0", "h.1", "ln_f"]


def test_a_bit_of_a_weight_is_located_although_float32_rounding_hides_it() -> None:
    state = random_state(CONFIG)
    state["h.1.mlp.c_fc.weight"].view(np.uint32)[0, 0] ^= 1
    result = diff(ORIGINAL, Checkpoint.of(state, CONFIG), seq_len=8)
    assert result.function is not None
    assert result.function.logits_difference <= result.function.logits_tolerance
    assert result.function.first_departure == "h.1"
    assert result.different_parts == ("tensors", "function")


@pytest.mark.parametrize(("name", "verdict"), [("gelu_fast", "same function"), ("gelu", "different")])
def test_another_spelling_of_the_activation_agrees_within_rounding(name: str, verdict: str) -> None:
    result = diff(ORIGINAL, ORIGINAL.with_activation(name), seq_len=8)
    assert result.verdict == verdict
    assert result.different_parts == (() if verdict == "same function" else ("configuration", "function"))


def test_a_rounded_copy_departs_at_the_embeddings() -> None:
    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in random_state(CONFIG).items()}
    found = compared(Checkpoint.of(rounded, CONFIG))
    assert found.first_departure == "drop"
    assert found.logits_difference > found.logits_tolerance
    assert 0 < found.kl_mean < found.kl_max < 0.1
    assert found.loss[0] == pytest.approx(found.loss[1], abs=0.1)


def test_vocabularies_of_different_sizes_are_compared_over_the_common_tokens() -> None:
    larger = bridge.resize_vocabulary(ORIGINAL, 300)
    found = compared(larger)
    assert found.is_within_rounding
    assert found.notes == ("the logits are compared over the 260 tokens that both vocabularies have",)
    assert compared(ORIGINAL, larger).notes[0] == found.notes[0]
    assert "tokens of the text are left out" in compared(ORIGINAL, larger).notes[1]


def test_models_of_different_sizes_are_compared_by_their_logits() -> None:
    found = compared(random_checkpoint(replace(CONFIG, n_embd=12, n_positions=6, n_layer=1)))
    assert found.tokens.startswith("2 x 6, ")
    assert found.hidden_states == {}
    assert found.notes == ("the hidden states are not compared, because the widths differ",)
    assert not found.is_within_rounding


@pytest.mark.filterwarnings("error")
def test_nan_is_not_agreement() -> None:
    state = random_state(CONFIG)
    state["ln_f.bias"][0] = math.nan
    broken = Checkpoint.of(state, CONFIG)
    for found in (compared(broken), compared(broken, broken)):
        assert not found.is_within_rounding
        assert found.top1_agreement == 0
        assert math.isnan(found.logits_difference)
    shown = diff(ORIGINAL, broken, seq_len=8).to_json()["function"]
    assert shown["kl_max"] is None and shown["logits_difference"] is None and shown["within_rounding"] is False


@pytest.mark.filterwarnings("error")
def test_weights_that_overflow_float32_are_not_agreement() -> None:
    huge = Checkpoint.of({name: array.astype(np.float64) * 1e200 for name, array in ORIGINAL.tensors.items()}, CONFIG)
    result = diff(ORIGINAL, huge, seq_len=8)
    assert result.different_parts == ("tensors", "function")


def test_one_position_or_no_common_token_cannot_be_compared() -> None:
    short = random_checkpoint(replace(CONFIG, n_positions=1))
    assert compare_functions(ORIGINAL, short) == "a model has one position, and a loss needs two tokens"
    result = diff(ORIGINAL, short)
    assert (result.function, result.verdict) == (None, "different")
    assert "one position" in result.not_run


def test_the_text_is_encoded_with_the_tokenizer_that_is_there(tmp_path: Path) -> None:
    huggingface_directory(tmp_path / "m", CONFIG)
    write_byte_tokenizer(tmp_path / "m")
    named = bridge.load(tmp_path / "m")
    changed = ORIGINAL.with_activation("relu")
    for pair in ((named, changed), (changed, named)):
        result = diff(*pair, text="We hold these truths", seq_len=8)
        assert result.function is not None and result.function.tokens == "2 x 8, the given text"
    with pytest.raises(NoTokenizerError):
        diff(ORIGINAL, changed, text="We hold")
    assert "random ids" in compared(changed).tokens
    assert compared(changed, named).tokens == "2 x 8, the built-in text"


@pytest.mark.parametrize("sizes", [{"batch_size": 0}, {"seq_len": 1}])
def test_sizes_without_a_token_to_predict_are_an_error(sizes: dict[str, int]) -> None:
    with pytest.raises(BridgeError, match="at least one sequence of two tokens"):
        compare_functions(ORIGINAL, ORIGINAL.with_activation("relu"), **sizes)  # type: ignore[arg-type]


def test_identical_models_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2_jax.diff.function.compare_functions", None)
    result: Diff = diff(ORIGINAL, replace(ORIGINAL, extra={"note": quoted("x")}))
    assert result.verdict == "same function" and result.function is None
    assert diff(ORIGINAL, ORIGINAL).verdict == "identical"

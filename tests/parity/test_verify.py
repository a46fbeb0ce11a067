"""The report of `verify`: checks, printed text, JSON, and exit codes."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from rich.console import Console
from support.models import TINY, huggingface_directory, random_checkpoint
from support.tokenizers_for_tests import write_byte_tokenizer

import bridge
import gpt2_torch
from bridge import Checkpoint
from gpt2_jax.cli import main
from gpt2_jax.parity import CHECKS, Check, Measurement, Report, verify
from gpt2_jax.parity.backends import transformers_gpt2
from gpt2_jax.parity.inputs import BUILT_IN_TEXT, CheckInputs, choose_tokens, default_length
from gpt2_jax.parity.reporting.report import SAME_CLASSIFIER
from gpt2_torch.ops.cross_entropy import next_token_loss

CONFIG = replace(TINY, n_layer=2, vocab_size=263)


def test_all_checks_pass_on_a_random_model() -> None:
    report = verify(random_checkpoint(CONFIG), seq_len=20)
    assert report.passed, [m for c in report.checks for m in c.measurements if not m.passed]
    others = ("classification", "batch-invariance")
    assert [check.name.replace(" ", "-") for check in report.checks] == [n for n in CHECKS if n not in others]
    assert [check.name for check in report.checks if check.skipped] == ["prediction", "tokenizer"]


@pytest.mark.thorough
def test_the_default_length_detects_mistakes_in_the_second_half_of_the_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(CONFIG, n_positions=800, n_layer=1)
    convert = bridge.to_flax

    def swap_late_positions(*args: Any, **kwargs: Any) -> dict[str, Any]:
        tree = jax.tree.map(np.array, convert(*args, **kwargs))
        embedding = tree["wpe"]["embedding"]
        embedding[[401, 402]] = embedding[[402, 401]]
        return tree

    monkeypatch.setattr(bridge, "to_flax", swap_late_positions)
    checkpoint = random_checkpoint(config)
    assert verify(checkpoint, seq_len=401, batch_size=1, checks=("logits",)).passed
    report = verify(checkpoint, batch_size=1, checks=("logits", "gradients"))
    assert [check.passed for check in report.checks] == [False, False]
    assert report.details["tokens"].startswith("1 x 464")


def test_gradients_use_a_limited_number_of_tokens() -> None:
    checkpoint = random_checkpoint(replace(CONFIG, n_positions=4096, n_layer=1))
    inputs = CheckInputs(checkpoint, choose_tokens(checkpoint, None, (1, default_length(checkpoint.config)), 0))
    assert inputs.ids.shape == (1, 2112)
    assert inputs.gradient_ids.tolist() == inputs.ids[:, :1024].tolist()


def test_models_without_tying_and_biases_pass() -> None:
    config = replace(CONFIG, tie_word_embeddings=False, bias=False, activation_function="relu", n_layer=1)
    report = verify(
        random_checkpoint(config), seq_len=9, checks=("logits", "hidden-states", "gradients", "transformers")
    )
    assert report.passed
    assert report.checks[-1].note == "its GPT-2 always has biases; this model has none"


def test_models_with_other_attention_options_pass() -> None:
    config = replace(CONFIG, reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True, n_inner=50)
    report = verify(random_checkpoint(config), seq_len=9, checks=("logits", "gradients", "transformers"))
    assert report.passed, [m for check in report.checks for m in check.measurements if not m.passed]


def test_the_transformers_check_is_skipped_if_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_gpt2, "is_installed", lambda: False)
    (check,) = verify(random_checkpoint(CONFIG), checks=("transformers",), seq_len=5).checks
    assert check.skipped
    assert "not installed" in check.note


def test_a_report_without_checks_does_not_pass() -> None:
    assert not Report("x", {}, ()).passed
    assert not Report("x", {}, (Check("prediction", note="no tokenizer"),)).passed


def test_nan_does_not_pass() -> None:
    assert not Measurement("difference", math.nan, 1.0).passed


def test_nan_in_the_weights_fails() -> None:
    checkpoint = random_checkpoint(CONFIG)
    state = {name: np.array(array) for name, array in checkpoint.tensors.items()}
    state["h.1.ln_2.bias"][0] = np.nan
    with np.errstate(invalid="ignore"):
        report = verify(Checkpoint.of(state, CONFIG), seq_len=9, checks=("logits", "hidden-states", "padding"))
    assert [check.passed for check in report.checks] == [False, False, False]


def test_the_report_as_json_and_as_text() -> None:
    report = verify(random_checkpoint(CONFIG), seq_len=9, checks=("hidden-states", "round-trip"), source="tiny")
    parsed = json.loads(json.dumps(report.to_json()))
    assert parsed["passed"] is True
    assert parsed["source"] == "tiny"
    assert [check["name"] for check in parsed["checks"]] == ["hidden states", "round trip"]
    assert all(
        m["passed"] and m["value"] <= m["tolerance"] for check in parsed["checks"] for m in check["measurements"]
    )
    out = io.StringIO()
    report.show(Console(file=out, width=120))
    assert "2 checks hold." in out.getvalue()


def test_a_failed_report_names_the_first_divergence() -> None:
    bad = Check("logits", (Measurement("fp64 difference", 2.0, 1.0),), first_divergence="h.3.mlp")
    out = io.StringIO()
    Report("x", {}, (bad,)).show(Console(file=out, width=120))
    assert "NOT the same function. Failed: logits." in out.getvalue()
    assert "first divergence at h.3.mlp" in out.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level model trained on the built-in text, better than guessing."""
    path = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    model = gpt2_torch.GPT2(replace(CONFIG, vocab_size=256))
    ids = torch.tensor(list(BUILT_IN_TEXT.encode()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        starts = np.random.default_rng(step).integers(0, len(ids) - 40, 8)
        batch = torch.stack([ids[s : s + 40] for s in starts])
        optimizer.zero_grad()
        next_token_loss(model(batch), batch).backward()
        optimizer.step()
    bridge.save(gpt2_torch.checkpoint_from_model(model), path, format="huggingface")
    write_byte_tokenizer(path)
    return path


def test_a_trained_model_predicts_text(trained: Path) -> None:
    (check,) = verify(bridge.load(trained), checks=("prediction",)).checks
    assert not check.skipped
    assert check.passed
    assert all(m.value < 0.8 for m in check.measurements)  # 150 steps of training give a margin to the limit of 1


def test_weights_in_a_wrong_layout_agree_but_fail_the_prediction(trained: Path) -> None:
    right = bridge.load(trained)
    state = {name: np.array(array) for name, array in right.tensors.items()}
    for name in [n for n in state if n.endswith("attn.c_proj.weight")]:
        state[name] = np.ascontiguousarray(state[name].T)
    for name in [n for n in state if n.endswith("c_attn.weight")]:
        D = CONFIG.n_embd
        state[name] = np.ascontiguousarray(state[name].reshape(D, 3, D).transpose(2, 1, 0).reshape(D, 3 * D))
    state["wpe.weight"] = state["wpe.weight"][::-1].copy()
    state["wte.weight"] = np.roll(state["wte.weight"], 7, axis=0)
    wrong = replace(right, tensors=Checkpoint.of(state, right.config).tensors)
    agreement, prediction = verify(wrong, checks=("hidden-states", "prediction"), seq_len=40).checks
    assert agreement.passed
    assert not prediction.passed
    assert "wrong layout" in prediction.note


def test_untrained_weights_do_not_need_to_predict(tmp_path: Path) -> None:
    path = huggingface_directory(tmp_path / "random", replace(CONFIG, vocab_size=256))
    write_byte_tokenizer(path)
    for untrained in (False, True):
        (check,) = verify(bridge.load(path), checks=("prediction",), untrained=untrained, seq_len=40).checks
        assert not check.skipped
        assert check.passed is untrained


def test_a_given_text_is_used_and_needs_a_tokenizer(trained: Path) -> None:
    report = verify(bridge.load(trained), text="We hold these truths", checks=("prediction",))
    assert report.details["tokens"] == "2 x 40, the given text"
    with pytest.raises(bridge.TokenizerError, match="tokenizer"):
        verify(random_checkpoint(CONFIG), text="We hold these truths", checks=("prediction",))
    with pytest.raises(bridge.TokenizerError, match="empty"):
        verify(bridge.load(trained), text="", checks=("prediction",))


def of_characters(path: Path, characters: str) -> Checkpoint:
    encoding = bridge.character_tokenizer(characters)
    bridge.save(random_checkpoint(replace(CONFIG, vocab_size=encoding.vocab_size)), path, format="huggingface")
    bridge.save_tokenizer(encoding, path)
    return bridge.load(path)


@pytest.mark.parametrize("characters", ["αβγδε ", "🎵🎶"])
def test_a_tokenizer_of_other_characters_runs_on_random_characters(tmp_path: Path, characters: str) -> None:
    report = verify(
        of_characters(tmp_path / "model", characters), checks=("hidden-states", "prediction"), seq_len=9, seed=3
    )
    assert report.passed
    assert report.details["tokens"] == "2 x 9, random characters of the tokenizer from seed 3"
    assert report.checks[1].skipped
    assert "--text" in report.checks[1].note


def test_random_characters_cover_the_tokenizers_characters_and_no_others() -> None:
    encoding = bridge.character_tokenizer("αβγ")
    checkpoint = replace(random_checkpoint(replace(CONFIG, vocab_size=9)), own_tokenizer=lambda: encoding)
    assert {*choose_tokens(checkpoint, None, (2, 40), 0).ids.ravel().tolist()} == {0, 1, 2}


def test_a_tokenizer_that_lacks_a_few_characters_runs_on_the_rest_of_the_text(tmp_path: Path) -> None:
    known = {*BUILT_IN_TEXT} - {*"JLv"}
    report = verify(of_characters(tmp_path / "model", "".join(known)), checks=("prediction",), seq_len=9)
    lacking = sum(character in "JLv" for character in BUILT_IN_TEXT)
    assert (
        report.details["tokens"] == f"2 x 9, the built-in text, without {lacking} characters that the tokenizer lacks"
    )
    assert not report.checks[0].skipped


def test_a_byte_order_mark_is_removed_from_a_text_file(tmp_path: Path) -> None:
    of_characters(tmp_path / "model", "ab")
    (tmp_path / "text").write_bytes("\ufeffabba".encode())
    arguments = ["verify", str(tmp_path / "model"), "--text-file", str(tmp_path / "text"), "--checks", "round-trip"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0


def test_the_command_exits_with_0_only_if_all_checks_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = huggingface_directory(tmp_path / "model", CONFIG)
    arguments = ["verify", str(path), "--seq-len", "9", "--checks", "hidden-states", "round-trip"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json", str(tmp_path / "report.json")])
    assert ended.value.code == 0
    assert json.loads((tmp_path / "report.json").read_text())["passed"] is True
    assert "2 checks hold" in capsys.readouterr().out

    right = bridge.to_torch
    monkeypatch.setattr(bridge, "to_torch", lambda *a, **k: {n: t * 2 for n, t in right(*a, **k).items()})
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1
    assert "NOT the same function. Failed: round trip." in capsys.readouterr().out


def verdict(report: Report) -> str:
    out = io.StringIO()
    report.show(Console(file=out, width=120, markup=False))
    return out.getvalue().strip().splitlines()[-1]


def test_equality_is_claimed_only_if_the_required_checks_passed() -> None:
    good = [Check(name, (Measurement("difference", 0.0, 1.0),)) for name in ("logits", "hidden states", "gradients")]
    skipped = Check("prediction", note="no tokenizer")
    claim = "the two backends are the same function"
    assert verdict(Report("x", {}, (*good, skipped))) == f"3 checks hold: {claim}. Skipped: prediction."
    assert verdict(Report("x", {}, tuple(good[:1]))) == "1 check holds."
    assert verdict(Report("x", {}, (skipped,))) == "Nothing was checked. Skipped: prediction."
    failed = Check("prediction", (Measurement("loss", 2.0, 1.0),))
    assert verdict(Report("x", {}, (*good, failed))) == "Failed: prediction."
    failed = Check("tokenizer", (Measurement("strings", 1, 0),))
    assert verdict(Report("x", {}, (*good, failed))) == "Failed: tokenizer."
    classification = Check("classification", good[0].measurements)
    assert verdict(Report("x", {}, tuple(good), claim=SAME_CLASSIFIER)) == "3 checks hold."
    assert verdict(Report("x", {}, (*good, classification), claim=SAME_CLASSIFIER)) == f"4 checks hold: {claim}."


def test_a_damaged_tokenizer_is_an_error(tmp_path: Path) -> None:
    path = huggingface_directory(tmp_path / "model", replace(CONFIG, vocab_size=256))
    write_byte_tokenizer(path)
    (path / "vocab.json").write_text("{ damaged")
    with pytest.raises(bridge.TokenizerError, match=r"vocab\.json' is not valid JSON"):
        verify(bridge.load(path), checks=("prediction",))


def test_layers_of_different_dtypes_skip_the_stacked_form() -> None:
    state = {name: np.array(array) for name, array in random_checkpoint(CONFIG).tensors.items()}
    for name in [n for n in state if n.startswith("h.0.")]:
        state[name] = state[name].astype(np.float16)
    report = verify(Checkpoint.of(state, CONFIG), seq_len=9, checks=("hidden-states", "training", "round-trip"))
    assert report.passed
    assert "stacked form skipped" in report.checks[-1].note


def test_weights_of_zero_pass() -> None:
    state = {name: np.zeros_like(array) for name, array in random_checkpoint(CONFIG).tensors.items()}
    assert verify(Checkpoint.of(state, CONFIG), seq_len=9, checks=("logits", "padding", "training")).passed


def test_unrelated_fields_of_a_config_are_not_passed_to_transformers() -> None:
    checkpoint = replace(random_checkpoint(CONFIG), extra={"return_dict": False, "bos_token_id": 50256})
    assert verify(checkpoint, seq_len=9, checks=("transformers",)).passed


def test_nan_is_null_in_json() -> None:
    report = Report("x", {}, (Check("logits", (Measurement("difference", math.nan, 1.0),)),))
    (check,) = json.loads(json.dumps(report.to_json(), allow_nan=False))["checks"]
    assert check["measurements"][0]["value"] is None
    assert check["measurements"][0]["passed"] is False


def test_sequences_of_one_token_are_refused() -> None:
    config = replace(CONFIG, n_positions=1)
    with pytest.raises(bridge.BridgeError, match="two tokens"):
        verify(random_checkpoint(config))

"""`verify` on text: the checks `tokenizer` and `generation`, and mistakes that they must report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import run
from support.models import TINY, huggingface_directory, random_checkpoint
from support.tokenizers_for_tests import write_byte_tokenizer
from tokenizing.kinds import KINDS, ROWS

import bridge
from bridge import Checkpoint, CheckpointError, GenerationConfig
from bridge.comparison.strings import difficult_strings
from bridge.tokenizers import tokenizer as tokenizer_module
from bridge.tokenizers.byte_level_bpe import ByteLevelBPE
from bridge.tokenizers.readers.huggingface import Files
from gpt2_jax.parity import Check, verify
from gpt2_jax.parity.backends import jax_gpt2, transformers_gpt2
from gpt2_jax.parity.inputs import CheckInputs, choose_tokens
from gpt2_jax.parity.text_checks import tokenizer as tokenizer_check

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

Patch = pytest.MonkeyPatch
CONFIG = replace(TINY, n_layer=1, vocab_size=ROWS)


def with_tokenizer(kind: str, directory: Path) -> Path:
    huggingface_directory(directory, CONFIG)
    KINDS[kind](directory)
    return directory


def check_of_tokenizer(checkpoint: Checkpoint) -> Check:
    return tokenizer_check(CheckInputs(checkpoint, choose_tokens(checkpoint, None, (1, 4), 0)))


def without_transformers(patch: Patch) -> None:
    patch.setattr(transformers_gpt2, "is_installed", lambda: False)


def failures(check: Check) -> dict[str, str]:
    return {m.name: m.location for m in check.measurements if not m.passed}


# The tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_compared_with_those_of_transformers(kind: str, tmp_path: Path) -> None:
    check = check_of_tokenizer(bridge.load(with_tokenizer(kind, tmp_path / "m")))
    assert check.passed and not check.skipped and not check.note, failures(check)
    assert [m.name.split(" ")[-1] for m in check.measurements[1:]] == ["transformers"]


@pytest.mark.parametrize("kind", KINDS)
def test_without_transformers_the_strings_make_a_round_trip(kind: str, tmp_path: Path, monkeypatch: Patch) -> None:
    without_transformers(monkeypatch)
    check = check_of_tokenizer(bridge.load(with_tokenizer(kind, tmp_path / "m")))
    assert check.passed and not check.skipped, failures(check)
    assert check.note == "round trip instead of a comparison: transformers is not installed"


def test_a_tokenizer_that_transformers_cannot_open_makes_a_round_trip(tmp_path: Path) -> None:
    checkpoint = replace(random_checkpoint(replace(CONFIG, vocab_size=257)), own_tokenizer=bridge.byte_tokenizer)
    check = check_of_tokenizer(checkpoint)
    assert check.passed and "not in files that transformers reads" in check.note
    directory = with_tokenizer("old_style", tmp_path / "m")
    (directory / "chat_template.jinja").symlink_to("/dev/zero")
    check = check_of_tokenizer(bridge.load(directory))
    assert check.passed and "is a link out of the checkpoint's directory" in check.note


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    directory = with_tokenizer("old_style", tmp_path / "m")
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "GPT2Tokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert check_of_tokenizer(bridge.load(directory)).passed
    assert not (tmp_path / "ran").exists()


def test_without_a_tokenizer_the_check_is_skipped_with_the_reason(tmp_path: Path) -> None:
    path = huggingface_directory(tmp_path / "m", CONFIG)
    report = tmp_path / "report.json"
    assert run("verify", path, "--checks", "tokenizer", "round-trip", "--seq-len", 4, "--json", report) == 0
    check = json.loads(report.read_text())["checks"][0]
    assert check["skipped"] and "has no tokenizer: neither vocab.json with merges.txt" in check["note"]


def test_the_strings_have_every_plane_lone_surrogates_and_the_added_tokens() -> None:
    text = "".join(difficult_strings(["<one>", "<two>"]))
    assert {ord(c) >> 16 for c in text} == set(range(17))
    assert any("\ud800" <= c < "\ue000" for c in text)
    assert "a<one>b" in text and "<one><two>" in text


def ignore_an_added_token(patch: Patch) -> None:
    right = Files.json
    patch.setattr(Files, "json", lambda *a: {name: v for name, v in right(*a).items() if name != "bitcoin"})


def encode_lone_surrogates_as_question_marks(patch: Patch) -> None:
    patch.setattr(tokenizer_module, "without_lone_surrogates", lambda t: t.encode("utf-8", "replace").decode())


def lose_spaces_at_the_end(patch: Patch) -> None:
    right = ByteLevelBPE._decode
    patch.setattr(ByteLevelBPE, "_decode", lambda *a: right(*a).rstrip(" "))


IDS = "strings whose ids differ from those of transformers"
TEXTS = "strings whose decoded text differs from that of transformers"


@pytest.mark.parametrize(
    ("mistake", "measurement", "place"),
    [
        (
            ignore_an_added_token,
            IDS,
            "'abitcoinb bitcoin cbitcoinbitcoin\\nbitcoi BITCOIN': token 1 is 410 'bitcoin' in",
        ),
        (
            encode_lone_surrogates_as_question_marks,
            IDS,
            "'a\\ud800b\\udfffc': token 1 is 171 'ï' in transformers, 30 '?'",
        ),
        (lose_spaces_at_the_end, TEXTS, "'  leading and trailing  ': the decoded texts differ at character 22"),
    ],
)
def test_a_wrong_tokenizer_fails(
    mistake: Callable[[Patch], None],
    measurement: str,
    place: str,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = with_tokenizer("old_style_with_added_tokens", tmp_path / "m")
    mistake(monkeypatch)
    [(name, location)] = failures(check_of_tokenizer(bridge.load(path))).items()
    assert name.startswith(measurement) and place in location
    assert run("verify", path, "--checks", "tokenizer", "--seq-len", 4) == 1
    assert "Failed: tokenizer." in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["old_style", "with_prefix_space"])
def test_a_text_that_changes_in_a_round_trip_fails(kind: str, tmp_path: Path, monkeypatch: Patch) -> None:
    checkpoint = bridge.load(with_tokenizer(kind, tmp_path / "m"))
    without_transformers(monkeypatch)
    right = ByteLevelBPE._decode
    monkeypatch.setattr(ByteLevelBPE, "_decode", lambda *a: right(*a)[:-1])
    [(name, location)] = failures(check_of_tokenizer(checkpoint)).items()
    assert name.startswith("strings that change in a round trip") and location


# Generation

Settings = Mapping[str, Any]
SMALL = replace(TINY, n_layer=1, vocab_size=256)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A saved model of bytes, without generation settings."""
    path = huggingface_directory(tmp_path / "m", SMALL)
    write_byte_tokenizer(path)
    return path


def check_of_generation(directory: Path, **settings: Any) -> Check:
    if settings:
        (directory / "generation_config.json").write_text(json.dumps(settings))
    [check] = verify(bridge.load(directory), checks=("generation",), seq_len=16).checks
    return check


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "do_sample": True,
            "temperature": 0.7,
            "top_k": 5,
            "num_return_sequences": 3,
            "eos_token_id": [7, 9],
            "repetition_penalty": 1.3,
            "no_repeat_ngram_size": 2,
            "max_length": 12,
        },
        {"num_beams": 100, "min_new_tokens": 4, "max_new_tokens": 6, "eos_token_id": 3},
    ],
    ids=["none", "sampling", "beams"],
)
def test_the_checkpoints_settings_apply_in_both_backends_and_transformers(directory: Path, settings: Settings) -> None:
    check = check_of_generation(directory, **settings)
    assert check.passed and "fully" not in check.note, (failures(check), check.note)
    assert len(check.measurements) == (4 if "eos_token_id" in settings else 3)
    assert check.note.startswith("0 of") == ("num_beams" in settings)  # an end is unlikely to be among the best beams


def test_settings_that_are_not_supported_are_named_and_left_to_the_two_backends(directory: Path) -> None:
    check = check_of_generation(directory, penalty_alpha=0.6)
    assert check.passed and len(check.measurements) == 1
    expected = "not all settings are supported: generation_config.json: 'penalty_alpha'"
    assert f"not fully compared with transformers: {expected}" in check.note


def test_a_model_without_biases_and_tokenizer_is_generated_by_both_backends() -> None:
    checkpoint = random_checkpoint(replace(SMALL, bias=False))
    [check] = verify(checkpoint, checks=("generation",), seq_len=16).checks
    assert check.passed and len(check.measurements) == 1
    assert "its GPT-2 always has biases" in check.note


def test_invalid_settings_are_an_error_before_the_first_check(directory: Path) -> None:
    (directory / "generation_config.json").write_text('{"repetition_penalty": "high"}')
    begun: list[str] = []
    with pytest.raises(CheckpointError, match="repetition_penalty='high': must be a finite number"):
        verify(bridge.load(directory), checks=("round-trip", "generation"), progress=begun.append)
    assert not begun


def test_weights_with_nan_fail() -> None:
    state = {name: np.array(array) for name, array in random_checkpoint(SMALL).tensors.items()}
    state["ln_f.bias"][0] = np.nan
    [check] = verify(Checkpoint.of(state, SMALL), checks=("generation",), seq_len=16).checks
    assert "logits are NaN or infinite" in failures(check)["texts without a next token"]


def jax_ignores_the_end(patch: Patch) -> None:
    class Endless(jax_gpt2.Decoder):
        def generate(self, prompts: Any, config: GenerationConfig) -> Any:
            return super().generate(prompts, replace(config, eos_token_id=None))

    patch.setattr(jax_gpt2, "Decoder", Endless)


def read(wrong: Callable[[bridge.GenerationDefaults], bridge.GenerationDefaults]) -> Callable[[Patch], None]:
    """Read the checkpoint's settings wrongly, for both backends."""
    right = bridge.generation_defaults
    return lambda patch: patch.setattr(bridge, "generation_defaults", lambda *a: wrong(right(*a)))


@pytest.mark.parametrize(
    ("mistake", "measurement", "place"),
    [
        (jax_ignores_the_end, "texts that differ, gpt2_jax vs gpt2_torch", "the end in gpt2_torch, "),
        (
            read(lambda found: replace(found, eos_token_ids=(4,))),
            "sets of end-of-sequence ids that differ from those of transformers",
            "[3] in transformers, [4] in this project",
        ),
        (
            read(lambda found: replace(found, settings={})),
            "texts that differ, gpt2_torch vs transformers",
            "in transformers, ",
        ),
    ],
    ids=["JAX ignores the end", "another end", "settings ignored"],
)
def test_a_different_text_or_end_fails(
    mistake: Callable[[Patch], None],
    measurement: str,
    place: str,
    directory: Path,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mistake(monkeypatch)
    (directory / "generation_config.json").write_text('{"eos_token_id": 3, "repetition_penalty": 5.0}')
    report = directory / "report.json"
    assert run("verify", directory, "--checks", "generation", "--seq-len", 16, "--json", report) == 1
    assert "Failed: generation." in capsys.readouterr().out
    [check] = json.loads(report.read_text())["checks"]
    failed = {m["name"]: m["location"] for m in check["measurements"] if not m["passed"]}
    [location] = [location for name, location in failed.items() if name.startswith(measurement)]
    assert place in location

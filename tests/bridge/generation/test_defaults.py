"""The generation settings of a checkpoint: invalid ones, unsupported ones, and how arguments override them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.models import TINY, random_checkpoint
from support.refusals import within_budget

import bridge
from bridge import BridgeError, CheckpointError, GenerationDefaults, generation_defaults
from bridge.generation.processors import LogitsProcessors
from bridge.generation.settings import SETTINGS


def defaults_of(directory: Path, text: str | dict[str, Any], **extra: Any) -> GenerationDefaults:
    """Return the defaults of a checkpoint with this `generation_config.json` and these fields in `config.json`."""
    stored = text if isinstance(text, str) else json.dumps(text)
    (directory / "generation_config.json").write_text(stored)
    return generation_defaults(replace(random_checkpoint(TINY), path=directory, extra=extra))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"temperature": "hot"}, "temperature='hot': must be a finite number"),
        ({"temperature": True}, "temperature='True': must be a finite number"),
        ({"do_sample": True, "temperature": -1}, "temperature=-1.0: must be 0.*or positive"),
        ({"do_sample": 1}, "do_sample='1': must be true or false"),
        ({"top_k": 1.5}, r"top_k='1\.5': must be an integer of at least 0"),
        ({"top_k": 2**70}, "top_k='1180591620717411303424': must be an integer"),
        ({"top_k": True}, "top_k='True': must be an integer"),
        ({"do_sample": True, "top_p": 1.5}, "top_p=1.5: must be between 0 and 1"),
        ({"do_sample": True, "typical_p": 0}, "typical_p=0.0: must be above 0"),
        ({"repetition_penalty": 0}, "repetition_penalty=0.0: must be positive"),
        ({"max_new_tokens": 0}, "max_new_tokens='0': must be an integer of at least 1"),
        ({"max_length": -5}, "max_length='-5': must be an integer of at least 1"),
        ({"min_new_tokens": None, "min_length": "3"}, "min_length='3': must be an integer"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>': must be a list of token ids"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id=.*: must be a list of token ids"),
        ({"eos_token_id": [True]}, "eos_token_id=.*: must be a list of token ids"),
        ({"suppress_tokens": 3}, "suppress_tokens='3': must be a list of token ids"),
        ({"suppress_tokens": [*range(257)]}, "suppress_tokens: no token is left"),
        ({"bad_words_ids": [3]}, "bad_words_ids=.*: must be a list of token ids"),
        ({"bad_words_ids": [[]]}, "bad_words_ids: a sequence is empty"),
        (
            {"bad_words_ids": [[1] * 9000, *[[2]] * 9000]},
            "bad_words_ids: 9001 sequences of up to 9000 tokens are too many",
        ),
        ({"sequence_bias": {"[1, 2]": 3.0}}, "sequence_bias=.*: must be a list of pairs"),
        ({"sequence_bias": [[[1], "a"]]}, "sequence_bias=.*: must be a finite number"),
        ({"exponential_decay_length_penalty": [1]}, "exponential_decay_length_penalty=.*: must be a pair"),
        (
            {"exponential_decay_length_penalty": [1, -2.0]},
            "exponential_decay_length_penalty=.*: must be a number of tokens",
        ),
        ({"early_stopping": "often"}, "early_stopping='often': must be true, false or \"never\""),
        ({"num_beams": 2, "length_penalty": 3000}, "length_penalty=3000.0: must be between -32 and 32"),
        (
            {"do_sample": True, "num_return_sequences": 2_000_000_000},
            "num_return_sequences=2000000000: must be at most",
        ),
        ({"num_beams": 2_000_000_000}, "num_beams=2000000000: must be at most 1024"),
        ({"num_beams": 3, "num_return_sequences": 4}, "num_return_sequences=4: must be at most num_beams=3"),
        ({"forced_eos_token_id": 4, "suppress_tokens": [4]}, "forced_eos_token_id=.*: also in suppress_tokens"),
    ],
)
def test_an_invalid_setting_is_refused_by_name(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    with (
        within_budget(),
        pytest.raises(CheckpointError, match=rf"^generation_config\.json has invalid settings; .*\n.*{says}"),
    ):
        defaults_of(tmp_path, settings)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"temperature": NaN}', "NaN is not a number in JSON"),
        ('{"temperature": 1e999}', "too large"),
        ('{"top_k": ' + "9" * 5000 + "}", "not valid JSON: 'the number"),
        ("[]", "must hold an object"),
        ('{"eos_token_id": 1, "eos_token_id": 2}', "appears twice"),
        ('{"bad_words_ids": [' + "[1]," * 200_000 + "[1]]}", "values"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "values"),
        (" " * 2**21, "bytes"),
    ],
)
def test_a_damaged_file_is_refused(text: str, says: str, tmp_path: Path) -> None:
    with within_budget(), pytest.raises(BridgeError, match=f"generation_config.json.*{says}"):
        defaults_of(tmp_path, text)


def test_every_invalid_setting_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        defaults_of(tmp_path, {name: {} for name in SETTINGS})
    assert [name for name in SETTINGS if f"{name}=" not in str(caught.value)] == []


def test_ids_outside_the_vocabulary_are_reported_and_have_no_effect(tmp_path: Path) -> None:
    """No token has such an id, so the settings without them are equivalent."""
    defaults = defaults_of(
        tmp_path,
        {
            "eos_token_id": [50256, 7],
            "suppress_tokens": [-1, 3, 999],
            "bad_words_ids": [[1, 300], [4, 5]],
            "sequence_bias": [[[2**70], 1.0]],
            "forced_bos_token_id": 257,
        },
    )
    config = defaults.config()
    assert (config.eos_token_ids, config.suppress_tokens, config.bad_words_ids) == ((7,), (3,), ((4, 5),))
    assert (config.sequence_bias, config.forced_bos_token_id) == (None, None)
    named = ["eos_token_id", "sequence_bias", "bad_words_ids", "forced_bos_token_id", "suppress_tokens"]
    assert [note.split(": ")[:2] for note in defaults.notes] == [["generation_config.json", name] for name in named]


def test_unsupported_settings_are_named(tmp_path: Path) -> None:
    neutral = {"renormalize_logits": False, "diversity_penalty": 0, "num_beam_groups": 1, "guidance_scale": None}
    neutral |= {"penalty_alpha": 0.0, "stop_strings": [], "token_healing": 0, "watermarking_config": {}}
    harmless = {"pad_token_id": 5, "use_cache": True, "transformers_version": "5.0.0", "output_scores": True}
    active = {"guidance_scale": 1.5, "stop_strings": ["x"], "renormalize_logits": True, "unheard\u202eof": 3}
    assert defaults_of(tmp_path, {**neutral, **harmless}).notes == ()
    defaults = defaults_of(tmp_path, {**harmless, **active, "do_sample": True, "num_beams": 4})
    notes = "\n".join(defaults.notes)
    assert all(
        name in notes for name in ("guidance_scale", "stop_strings", "renormalize_logits", "unheard", "num_beams")
    )
    assert len(defaults.notes) == 5
    zeros = defaults_of(tmp_path, {"guidance_scale": 0, "max_time": 0.0, "prompt_lookup_num_tokens": 0})
    assert len(zeros.notes) == 3, "0 is not the neutral value of these"
    assert "\u202e" not in notes
    assert defaults.config().num_beams == 1
    assert len(defaults_of(tmp_path, {f"x{i}": i + 2 for i in range(1000)}).notes) == 40


def test_a_link_out_of_the_directory_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "secret.json").write_text('{"top_k": 3}')
    (tmp_path / "m" / "generation_config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match="link out of the checkpoint's directory"):
        generation_defaults(replace(random_checkpoint(TINY), path=tmp_path / "m"))


GREEDY = {"temperature": 0.6, "top_p": 0.8, "eos_token_id": 9}
SAMPLING = {**GREEDY, "do_sample": True}


@pytest.mark.parametrize(
    ("settings", "overrides", "expected"),
    [
        (GREEDY, {}, {"temperature": 0.0, "top_k": None, "top_p": None}),
        (GREEDY, {"do_sample": True}, {"temperature": 0.6, "top_k": 50, "top_p": 0.8}),
        (GREEDY, {"temperature": 0.9}, {"temperature": 0.9, "top_k": 50, "top_p": 0.8}),
        (GREEDY, {"temperature": 1.0, "top_k": 0}, {"temperature": 1.0, "top_k": 0}),
        (SAMPLING, {}, {"temperature": 0.6, "top_k": 50, "top_p": 0.8}),
        (SAMPLING, {"temperature": 0.0}, {"temperature": 0.0, "top_k": None, "top_p": None}),
        (SAMPLING, {"do_sample": False}, {"temperature": 0.0, "top_p": None}),
        (SAMPLING, {"num_beams": 3}, {"temperature": 0.0, "top_p": None, "num_beams": 3}),
        ({"num_beams": 3}, {"temperature": 1.0}, {"temperature": 1.0, "num_beams": 1}),
        ({"num_return_sequences": 3}, {}, {"num_return_sequences": 1}),
        ({**SAMPLING, "num_return_sequences": 3}, {}, {"num_return_sequences": 3}),
        (SAMPLING, {"eos_token_id": ()}, {"eos_token_id": ()}),
        ({"max_new_tokens": 7, "max_length": 9}, {}, {"max_new_tokens": 7}),
        ({"max_length": 9}, {}, {"max_new_tokens": 4}),
        ({"max_length": 9}, {"max_new_tokens": 30}, {"max_new_tokens": 30}),
        ({"min_length": 9}, {}, {"min_new_tokens": 4}),
        ({"min_length": 9, "min_new_tokens": 2}, {}, {"min_new_tokens": 2}),
        ({"min_length": 2}, {}, {"min_new_tokens": 0}),
    ],
)
def test_arguments_override_settings(
    settings: dict[str, Any], overrides: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    config = defaults_of(tmp_path, settings).config(5, **overrides)
    config.check(TINY, [[1] * 5])
    assert {name: getattr(config, name) for name in expected} == expected


def test_an_argument_of_sampling_without_sampling_is_an_error(tmp_path: Path) -> None:
    config = defaults_of(tmp_path, GREEDY).config(top_p=0.5)
    with pytest.raises(BridgeError, match=r"top_p=0.5: has no effect without a temperature"):
        config.check(TINY, [[1]])


def test_max_length_leaves_room_for_a_token(tmp_path: Path) -> None:
    defaults = defaults_of(tmp_path, {"max_length": 9})
    with pytest.raises(
        BridgeError, match=r"generation_config.json: max_length=9 includes the prompt, which has 9 tokens"
    ):
        defaults.config(9)
    assert defaults.config(9, max_new_tokens=3).max_new_tokens == 3


def test_without_a_limit_the_new_tokens_fit_into_the_positions(tmp_path: Path) -> None:
    defaults, room = defaults_of(tmp_path, {}), TINY.n_positions - 9
    assert [defaults.config(9).max_new_tokens, defaults.config(9, new_tokens=3).max_new_tokens] == [20, 3]
    assert defaults.config(9, new_tokens=10**6).max_new_tokens == room
    assert defaults.config(9, new_tokens=10**6, slide=True).max_new_tokens == 10**6


@pytest.mark.parametrize(
    ("file", "extra", "ids", "source"),
    [
        ({"eos_token_id": 3}, {"eos_token_id": 4}, (3,), "generation_config.json"),
        ({"eos_token_id": [3, 5]}, {}, (3, 5), "generation_config.json"),
        ({"eos_token_id": None}, {"eos_token_id": 4}, (), "generation_config.json"),
        ({}, {"eos_token_id": 4}, (4,), "config.json"),
        ({}, {"eos_token_id": None}, (), "config.json"),
        ({}, {}, (256,), "tokenizer"),
    ],
)
def test_generation_ends_at_the_first_end_that_is_named(
    file: dict[str, Any], extra: dict[str, Any], ids: tuple[int, ...], source: str, tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(file))
    checkpoint = replace(random_checkpoint(TINY), path=tmp_path, extra=extra)
    defaults = generation_defaults(checkpoint, bridge.byte_tokenizer())
    assert (defaults.eos_token_ids, defaults.eos_source) == (ids, source)
    is_other = bool(ids) and source != "generation_config.json"
    assert any("transformers would not end it" in note for note in defaults.notes) == is_other
    if source == "tokenizer":
        assert generation_defaults(checkpoint).eos_token_ids == ()


def test_a_long_list_of_words_costs_little(tmp_path: Path) -> None:
    words = [[i % 250, i // 250] for i in range(20_000)]
    with within_budget():
        config = defaults_of(tmp_path, {"bad_words_ids": words}).config()
        processors = LogitsProcessors.of(config, TINY.vocab_size)
    assert processors.bad_words is not None and processors.bad_words.token_K.shape == (2**15,)

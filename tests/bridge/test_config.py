"""The configuration: sizes, validation, and reading and writing Hugging Face's config.json."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from support.models import TINY, huggingface_directory

import bridge
from bridge import GPT2_SIZES, ConfigError, GPT2Config
from bridge.config import ACTIVATIONS, harmless_fields

PUBLISHED_COUNTS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}

# No field equals its default, so that a field which is not converted is detected.
UNUSUAL = GPT2Config(
    vocab_size=301,
    n_positions=33,
    n_embd=20,
    n_layer=3,
    n_head=4,
    n_inner=54,
    activation_function="relu",
    layer_norm_epsilon=3e-4,
    initializer_range=0.05,
    embd_pdrop=0.2,
    attn_pdrop=0.3,
    resid_pdrop=0.4,
    scale_attn_weights=False,
    scale_attn_by_inverse_layer_idx=True,
    reorder_and_upcast_attn=True,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize(("name", "count"), PUBLISHED_COUNTS.items())
def test_the_four_sizes_have_exactly_their_published_parameter_counts(name: str, count: int) -> None:
    assert bridge.num_parameters(GPT2_SIZES[name]) == count


def test_there_are_four_sizes_and_the_first_is_the_default() -> None:
    assert list(GPT2_SIZES) == list(PUBLISHED_COUNTS)
    assert GPT2_SIZES["gpt2"] == GPT2Config()


def test_derived_sizes_follow_from_the_fields() -> None:
    assert GPT2Config().head_size == 64
    assert GPT2Config().feed_forward_size == 3072
    assert UNUSUAL.head_size == 5
    assert UNUSUAL.feed_forward_size == 54


def test_a_configuration_is_immutable_and_hashable() -> None:
    with pytest.raises(AttributeError):
        TINY.n_layer = 2  # type: ignore[misc]
    assert {TINY: 1}[replace(TINY)] == 1


# Validation


HUGE = 10**400  # valid in JSON, but too large for a float


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            (size, bad)
            for size in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
            for bad in (0, -1, None)
        ),
        ("n_inner", 0),
        ("n_layer", 10**9),
        ("n_layer", "12"),
        ("n_layer", True),
        ("n_layer", 12.0),
        ("vocab_size", 2**31),
        ("n_positions", HUGE),
        ("n_inner", "100"),
        ("activation_function", "swiglu"),
        ("activation_function", ""),
        ("activation_function", None),
        ("activation_function", ["relu"]),
        ("layer_norm_epsilon", math.nan),
        ("layer_norm_epsilon", math.inf),
        ("layer_norm_epsilon", 0.0),
        ("layer_norm_epsilon", -1e-5),
        ("layer_norm_epsilon", "1e-5"),
        ("layer_norm_epsilon", HUGE),
        ("layer_norm_epsilon", True),
        ("initializer_range", -0.02),
        ("initializer_range", math.nan),
        ("embd_pdrop", 1.0),
        ("attn_pdrop", -0.1),
        ("resid_pdrop", math.nan),
        ("resid_pdrop", HUGE),
        ("scale_attn_weights", 1),
        ("scale_attn_by_inverse_layer_idx", "true"),
        ("reorder_and_upcast_attn", None),
        ("tie_word_embeddings", 0),
        ("bias", "False"),
    ],
    ids=lambda value: "huge" if value == HUGE else None,
)
def test_an_invalid_field_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"(?m)^  - {field}=") as caught:
        replace(TINY, **{field: value})  # type: ignore[arg-type]
    assert str(caught.value).count("\n") == 1, "one problem, one line"
    assert len(str(caught.value)) < 400


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="n_embd='50' is not divisible by n_head='3'"):
        replace(TINY, n_embd=50)


def test_every_invalid_field_is_named_in_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        GPT2Config(vocab_size=0, n_layer=-1, n_embd=50, n_head=3, activation_function="no", layer_norm_epsilon=math.nan)
    message = str(caught.value)
    for expected in ("vocab_size=", "n_layer=", "not divisible", "activation_function=", "layer_norm_epsilon="):
        assert expected in message
    assert "n_positions" not in message


def test_wrong_types_and_wrong_values_are_named_together() -> None:
    with pytest.raises(ConfigError) as caught:
        GPT2Config(n_layer="12", bias=1, n_head=0, embd_pdrop=2.0)  # type: ignore[arg-type]
    assert all(f"  - {field}=" in str(caught.value) for field in ("n_layer", "bias", "n_head", "embd_pdrop"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_known_activation_is_accepted(activation: str) -> None:
    assert replace(TINY, activation_function=activation).activation_function == activation


def test_an_integer_is_valid_as_a_float() -> None:
    assert replace(TINY, embd_pdrop=0, layer_norm_epsilon=1).layer_norm_epsilon == 1


# Hugging Face's config.json


@pytest.mark.parametrize("config", [*GPT2_SIZES.values(), TINY, UNUSUAL], ids=lambda c: f"{c.n_layer}x{c.n_embd}")
def test_the_round_trip_through_config_json_is_exact(config: GPT2Config) -> None:
    assert GPT2Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_every_field_of_the_unusual_configuration_differs_from_the_default() -> None:
    defaults = asdict(GPT2Config())
    same = [name for name, value in asdict(UNUSUAL).items() if value == defaults[name]]
    assert same == ["bias"], "these fields would not be tested by a round trip"


def test_transformers_own_configuration_loads_with_the_same_values() -> None:
    theirs = transformers.GPT2Config()
    ours = GPT2Config.from_hf(theirs.to_dict())
    assert all(getattr(theirs, name) == value for name, value in asdict(ours).items() if name != "bias")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "switches",
    [
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"tie_word_embeddings": False},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    ],
    ids="+".join,
)
def test_configurations_of_transformers_load_with_every_switch(activation: str, switches: dict[str, bool]) -> None:
    theirs = transformers.GPT2Config(activation_function=activation, n_inner=100, **switches)
    expected = replace(GPT2Config.from_hf({"model_type": "gpt2"}), activation_function=activation, n_inner=100)
    for form in (theirs.to_dict(), theirs.to_diff_dict(), json.loads(theirs.to_json_string())):
        # to_diff_dict omits fields that equal their defaults, except model_type.
        assert GPT2Config.from_hf(form) == replace(expected, **switches)


def test_transformers_reads_our_config_json_with_the_same_values() -> None:
    theirs = transformers.GPT2Config(**UNUSUAL.to_hf())
    assert all(getattr(theirs, name) == value for name, value in asdict(UNUSUAL).items() if name != "bias")
    assert theirs.architectures == ["GPT2LMHeadModel"]


def test_absent_fields_take_the_defaults_of_transformers() -> None:
    ours = asdict(GPT2Config.from_hf({"model_type": "gpt2"}))
    theirs = transformers.GPT2Config()
    assert ours.pop("bias") is True
    assert ours == {name: getattr(theirs, name) for name in ours}


def test_an_architecture_replaces_a_missing_model_type() -> None:
    assert GPT2Config.from_hf({"architectures": ["GPT2LMHeadModel"], "n_layer": 3}).n_layer == 3


def test_the_generic_names_of_transformers_are_read() -> None:
    generic = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 5, "max_position_embeddings": 40}
    ours = GPT2Config.from_hf({"model_type": "gpt2", **generic})
    assert (ours.n_embd, ours.n_head, ours.n_layer, ours.n_positions) == (48, 3, 5, 40)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_size": 48, "n_embd": 64}, ["hidden_size='48'", "n_embd='64'"]),
        ({"n_positions": 5, "max_position_embeddings": 6}, ["n_positions", "max_position_embeddings"]),
        ({"num_hidden_layers": 2, "n_layer": 3}, ["num_hidden_layers", "n_layer"]),
        ({"num_attention_heads": 2, "n_head": 3}, ["num_attention_heads", "n_head"]),
    ],
)
def test_two_names_of_one_setting_must_agree(fields: dict[str, int], named: list[str]) -> None:
    with pytest.raises(ConfigError, match="aliases of one setting but have different values") as caught:
        GPT2Config.from_hf({"model_type": "gpt2", **fields})
    assert all(name in str(caught.value) for name in named)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("add_cross_attention", True),
        ("auto_map", {"AutoModel": "modeling.Evil"}),
        ("quantization_config", {"bits": 4}),
        ("is_encoder_decoder", True),
        ("pruned_heads", {"0": [1]}),
        ("position_embedding_type", "relative_key"),
        ("rotary_dim", 64),
        ("rope_theta", 10000.0),
        ("rope_scaling", {"type": "linear"}),
        ("alibi", True),
        ("use_alibi", True),
        ("attention_window", 256),
        ("sliding_window", 4096),
        ("num_key_value_heads", 4),
        ("num_local_experts", 8),
        ("norm_type", "rms"),
        ("parallel_residual", True),
        ("embedding_multiplier", 12.0),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 0.5),
        ("num_experts", 8),
        ("use_rms_norm", True),
        ("quantized", True),
        ("is_causal", False),
        ("sliding_window", 8),
        ("per_layer_config", {"0": {"n_inner": 8}}),
        ("transformers_weights", "other.safetensors"),
        ("adapters", {"adapters": {"a": {}}}),
        ("mlp_type", "swiglu"),
        ("bias", False),
        ("lora_rank", 8),
    ],
)
def test_a_field_that_changes_the_mathematics_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        GPT2Config.from_hf({**TINY.to_hf(), field: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "gpt_neox"},
        {"model_type": None},
        {"model_type": 7},
        {"model_type": ["gpt2"]},
        {"architectures": ["LlamaForCausalLM"]},
        {},
    ],
)
def test_another_model_type_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="model_type"):
        GPT2Config.from_hf(fields)


@pytest.mark.parametrize("architectures", ["GPT2LMHeadModel", [1], {"a": 1}])
def test_architectures_must_be_a_list_of_names(architectures: object) -> None:
    with pytest.raises(ConfigError, match="architectures"):
        GPT2Config.from_hf({"model_type": "gpt2", "architectures": architectures})


@pytest.mark.parametrize("value", [[], "gpt2", None, 3])
def test_a_config_json_that_is_not_an_object_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="must hold an object"):
        GPT2Config.from_hf(value)  # type: ignore[arg-type]


def test_all_unsupported_fields_are_named_in_one_error() -> None:
    bad = {"add_cross_attention": True, "rotary_dim": 64, "hidden_size": 3}
    with pytest.raises(ConfigError) as caught:
        GPT2Config.from_hf({**TINY.to_hf(), **bad})
    assert all(name in str(caught.value) for name in ("add_cross_attention", "rotary_dim", "hidden_size"))


def test_fields_of_another_architecture_are_not_reported() -> None:
    with pytest.raises(ConfigError, match="another kind of model") as caught:
        GPT2Config.from_hf({"model_type": "llama", "attention_bias": False, "rope_theta": 1e4})
    assert "llama" in str(caught.value)
    assert "rope" not in str(caught.value)


SUSPICIOUS = """
feed_forward_proj d_ff d_model act_fn is_causal bidirectional gated_mlp swiglu post_ln
use_rms use_qk_clip softmax_temperature logit_multiplier ffn_gate
attn_sink_tokens my_rope_variant moe_every qk_scaling num_memory_layers mlp_gate residual_gate
"""


@pytest.mark.parametrize("name", SUSPICIOUS.split())
def test_unknown_fields_with_mathematical_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        GPT2Config.from_hf({**TINY.to_hf(), name: 2})


@pytest.mark.parametrize(
    "name",
    [
        *("transformers_version", "terms", "platform", "finetuning_task", "temperature", "tokenizer_class"),
        *("my_run_name", "property", "exploration", "glue_task", "max_grad_norm", "lr_multiplier", "conversation"),
        *("delegate", "my_dropout", "tensor_parallel_size", "attention_heads_note", "prompt_layers", "normalize_text"),
    ],
)
def test_other_unknown_fields_are_kept(name: str) -> None:
    assert GPT2Config.from_hf({**TINY.to_hf(), name: 2}) == TINY
    assert harmless_fields({**TINY.to_hf(), name: 2}) == {name: 2}


def test_control_characters_of_a_config_are_escaped_in_the_message() -> None:
    with pytest.raises(ConfigError) as caught:
        GPT2Config.from_hf({**TINY.to_hf(), "rope\x1b[31m\n": "\x07\u202e"})
    assert "\\x1b[31m\\n" in str(caught.value)
    assert not set("\x1b\x07\u202e") & set(str(caught.value))


@pytest.mark.parametrize("depth", [900, 950, 990])
def test_a_deeply_nested_value_is_refused(tmp_path: Path, depth: int) -> None:
    """The value is nested just below the depth at which the JSON parser raises an error."""
    path = huggingface_directory(tmp_path / "model")
    config = (path / "config.json").read_text().rstrip().removesuffix("}")
    (path / "config.json").write_text(f'{config}, "rope": {"[" * depth}{"]" * depth}}}')
    with pytest.raises(bridge.BridgeError):
        bridge.load(path)


HOSTILE: dict[str, object] = {
    "null": None,
    "true": True,
    "a text": "12",
    "an empty text": "",
    "a megabyte of text": "x" * 2**20,
    "half a surrogate pair": "\ud800",
    "escape codes": "\x1b[31m",
    "minus one": -1,
    "a half": 0.5,
    "2^31": 2**31,
    "2^70": 2**70,
    "10^400": HUGE,
    "10^5000": 10**5000,
    "-10^400": -HUGE,
    "NaN": math.nan,
    "infinity": math.inf,
    "a list": [12],
    "an object": {"a": [{}]},
    "a thousand objects": [{}] * 1000,
}
FIELDS = (
    *TINY.to_hf(),
    *("n_ctx", "hidden_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers"),
    *("add_cross_attention", "pruned_heads", "chunk_size_feed_forward", "position_embedding_type", "auto_map", "rope"),
)


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_an_arbitrary_value_of_any_field_is_accepted_unchanged_or_refused(value: object) -> None:
    for name in FIELDS:
        fields = {**TINY.to_hf(), name: value}
        try:
            config = GPT2Config.from_hf(fields)
        except ConfigError as error:
            assert str(error).replace("\n", "").isprintable()
            assert len(str(error)) < 1000
        else:
            assert GPT2Config.from_hf(config.to_hf(harmless_fields(fields))) == config


@pytest.mark.parametrize("name", [7, None, ("n_layer",), "_a" * 500_000, "d" * 257, ""], ids=lambda name: str(name)[:9])
def test_names_of_fields_that_are_not_short_texts_are_refused(name: Any) -> None:
    """Matching a long name against the patterns would take minutes."""
    started = time.process_time()
    fields = {**TINY.to_hf(), name: 1}
    if name == "":
        assert harmless_fields(fields) == {"": 1}
    else:
        with pytest.raises(ConfigError, match="names must be text of at most 256 characters"):
            GPT2Config.from_hf(fields)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "extra",
    [
        {f"note{i}": i for i in range(200_000)},
        {"note": "x" * 2**20},
        {"note": [[]] * 300_000},
        {"note": [[[[[]] * 9] * 9] * 9] * 99},
    ],
    ids=["many fields", "a long text", "many lists", "many lists in lists"],
)
def test_extra_fields_that_are_too_many_or_too_large_are_refused(tmp_path: Path, extra: dict[str, Any]) -> None:
    """They are refused because every export would contain them."""
    path = huggingface_directory(tmp_path / "model")
    (path / "config.json").write_text(json.dumps({**TINY.to_hf(), **extra}))
    with pytest.raises(bridge.CheckpointError, match=r"config\.json' (is larger than 1048576 bytes|holds more than)"):
        bridge.load(path)


def test_harmless_fields_with_mathematical_names_are_accepted() -> None:
    fields = {
        "summary_first_dropout": 0.1,
        "output_attentions": True,
        "output_hidden_states": False,
        "_attn_implementation_autoset": True,
        "attn_implementation": "sdpa",
        "pruned_heads": {},
        "is_encoder_decoder": False,
        "quantization_config": None,
        "rope_scaling": None,
    }
    assert GPT2Config.from_hf({**TINY.to_hf(), **fields}) == TINY


def test_harmless_fields_survive_load_save_load(tmp_path: Path) -> None:
    harmless = {"task_specific_params": {"text-generation": {"max_length": 50}}, "my_note": "å\n", "eos_token_id": 7}
    first = huggingface_directory(tmp_path / "first")
    config = json.loads((first / "config.json").read_text())
    (first / "config.json").write_text(json.dumps({**config, **harmless, "n_ctx": TINY.n_positions}))
    source = first
    for format in ("huggingface", "flax", "huggingface"):
        loaded = bridge.load(source)
        assert loaded.extra == harmless
        bridge.save(loaded, source := tmp_path / f"after-{source.name}", format=format)
        assert harmless.items() <= json.loads((source / "config.json").read_text()).items()
    assert bridge.load(source).extra == harmless
    assert bridge.load(source).config == TINY


def test_extra_fields_do_not_override_the_configuration() -> None:
    written = TINY.to_hf({"n_layer": 99, "model_type": "bert", "note": "kept"})
    assert (written["n_layer"], written["model_type"], written["note"]) == (TINY.n_layer, "gpt2", "kept")


def test_harmless_fields_are_those_outside_the_configuration() -> None:
    assert harmless_fields({**TINY.to_hf(), "n_ctx": 40, "hidden_size": 48, "note": 1}) == {"note": 1}


def test_a_model_without_biases_has_no_config_json() -> None:
    with pytest.raises(ConfigError, match="bias=False"):
        replace(TINY, bias=False).to_hf()

"""The configuration of a run: validation, storage, and the numbers of the presets."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from support.refusals import within_budget
from support.training_runs import recipe

from bridge import GPT2_SIZES, BridgeError, GPT2Config
from gpt2_jax.lora import LoRAConfig
from gpt2_jax.training import PRESETS, OptimizerConfig, TrainConfig, TrainingError
from gpt2_jax.training.config import CHANGEABLE_FIELDS, flat, from_flat

NAN, INFINITE = math.nan, math.inf

BAD: dict[str, tuple[Any, ...]] = {
    "max_steps": (0, -1, 2**31),
    "batch_size": (0,),
    "seq_len": (0,),
    "num_microbatches": (0, 3),  # 3 does not divide the batch of 4
    "eval_every": (0, 2**31),
    "eval_batches": (0,),
    "log_every": (0, 2**31),
    "checkpoint_every": (0, 2**31),
    "keep_last": (0,),
    "vocab_multiple": (0,),
    "validation_fraction": (0.0, 1.0, NAN),
    "seed": (-1, 2**32),
    "sample_tokens": (-1,),
    "ema_decay": (0.0, 1.0, NAN),
    "dtype": ("float16",),
    "remat": ("some",),
    "attention": ("some",),
    "examples": ("words",),
    "optimizer": ("sgd",),
    "schedule": ("linear",),
    "learning_rate": (0.0, -1.0, INFINITE, NAN),
    "epsilon": (0.0, NAN),
    "muon_learning_rate": (0.0, INFINITE),
    "min_learning_rate": (-1e-3, NAN),
    "weight_decay": (-0.1, INFINITE),
    "muon_weight_decay": (-0.1,),
    "warmup_steps": (-1, 2**31),
    "beta1": (1.0, -0.1, NAN),
    "beta2": (1.0,),
    "muon_momentum": (1.0,),
    "decay_fraction": (0.0, 1.1, NAN),
    "max_grad_norm": (0.0, NAN, INFINITE),
    "decay_steps": (-1, 2, 2**31),  # the warm-up takes 2
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_values_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(TrainingError, match=rf"- {name}={value!r}: "):
        recipe(**{name: value})


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(TrainingError) as raised:
        recipe(**{name: values[0] for name, values in BAD.items()})
    named = {line.split("- ")[1].split("=")[0] for line in str(raised.value).splitlines()[1:]}
    assert named == set(BAD)


def test_the_edges_of_the_ranges_are_allowed() -> None:
    recipe(ema_decay=None, max_grad_norm=None, eval_batches=None, decay_steps=None, warmup_steps=0, seed=2**32 - 1)
    recipe(min_learning_rate=0.0, weight_decay=0.0, beta1=0.0, decay_fraction=1.0, sample_tokens=0, keep_last=1)
    recipe(max_steps=2**31 - 1, decay_steps=2**31 - 1)


def test_flags_have_unique_names() -> None:
    """The fields of the four dataclasses become flags of one namespace. Only `optimizer` occurs twice."""
    outer, model, optimizer, lora = (
        {f.name for f in dataclasses.fields(c)} for c in (TrainConfig, GPT2Config, OptimizerConfig, LoRAConfig)
    )
    lora = {f"lora_{name}" for name in lora}
    assert not outer & lora
    assert not outer & model
    assert not model & optimizer
    assert outer & optimizer == {"optimizer"}
    assert set(flat(TrainConfig())) == outer - {"model", "lora"} | model | optimizer | lora


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_a_round_trip_through_json(name: str) -> None:
    config = PRESETS[name]
    assert config.preset == name
    assert from_flat(json.loads(json.dumps(flat(config)))) == config


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({**flat(TrainConfig()), "momentum": 0.9}, "other fields than this version:\n  - 'momentum' is unknown"),
        ({k: v for k, v in flat(TrainConfig()).items() if k != "n_layer"}, "other fields.*:\n  - 'n_layer' is missing"),
        ([], "must be an object"),
        ("nano", "must be an object"),
        (None, "must be an object"),
    ],
    ids=["unknown", "missing", "list", "text", "nothing"],
)
def test_an_object_that_is_not_a_configuration_is_refused(stored: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        from_flat(stored)


HOSTILE: list[Any] = [2**70, 10**400, -(10**400), NAN, INFINITE, "", "text\x1b[31m", "a\0b", True, None, [], {}, [[1]]]
"""JSON values to try for every field."""


@pytest.mark.parametrize("name", flat(TrainConfig()))
def test_every_stored_value_is_accepted_or_raises_an_error_of_this_project(name: str) -> None:
    for value in HOSTILE:
        with within_budget():
            try:
                config = from_flat({**flat(TrainConfig()), name: value})
            except BridgeError as error:
                message = str(error)
                assert name in message
                assert message.replace("\n", "").isprintable() and len(message) < 1000
            else:
                kept = type(json.loads(json.dumps(flat(config)[name])))
                assert kept is (list if name == "validation_data" else type(value))  # one string and None become lists


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 10**400),
        ("max_steps", True),
        ("max_steps", "many"),
        ("max_steps", 3.0),
        ("seed", 2**70),
        ("batch_size", 2**31),
        ("learning_rate", 10**400),
        ("learning_rate", True),
        ("learning_rate", "1e-3"),
        ("max_grad_norm", "1"),
        ("ema_decay", []),
        ("scan", 1),
        ("scan", None),
        ("tensorboard", "yes"),
        ("data", None),
        ("data", "a\0b"),
        ("mesh", "data=2\x1b[31m"),
        ("optimizer", ["adamw"]),
        ("dtype", None),
        ("decay_steps", 1.5),
        ("wandb", {}),
    ],
)
def test_a_value_of_another_type_or_size_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(TrainingError, match=f"- {name}="):
        from_flat({**flat(TrainConfig()), name: value})


def test_an_int_is_a_float() -> None:
    assert from_flat({**flat(TrainConfig()), "max_grad_norm": 1}).optimizer.max_grad_norm == 1


def test_fields_that_a_resumed_run_may_change_exist_and_do_not_affect_weights() -> None:
    assert set(flat(TrainConfig())) >= CHANGEABLE_FIELDS
    assert not CHANGEABLE_FIELDS & {
        "max_steps",
        "batch_size",
        "seq_len",
        "seed",
        "optimizer",
        "num_microbatches",
        "dtype",
        "ema_decay",
    }


# nanoGPT's values (github.com/karpathy/nanoGPT, commit 3adf61e): the defaults of train.py, then those of each recipe.
NANOGPT = {
    "beta1": 0.9,
    "beta2": 0.95,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "learning_rate": 6e-4,
    "min_learning_rate": 6e-5,
    "warmup_steps": 2000,
    "max_steps": 600_000,
    "schedule": "cosine",
    "optimizer": "adamw",
}
SHAKESPEARE = NANOGPT | {
    "n_layer": 6,
    "n_head": 6,
    "n_embd": 384,
    "n_positions": 256,
    "seq_len": 256,
    "batch_size": 64,
    "num_microbatches": 1,
    "embd_pdrop": 0.2,
    "attn_pdrop": 0.2,
    "resid_pdrop": 0.2,
    "learning_rate": 1e-3,
    "min_learning_rate": 1e-4,
    "beta2": 0.99,
    "warmup_steps": 100,
    "max_steps": 5000,
    "eval_every": 250,
    "bias": False,
    "tokenizer": "characters",
}
PUBLISHED = {
    "shakespeare-char-gpu": SHAKESPEARE,
    "shakespeare-char": SHAKESPEARE  # the README's flags for a machine without a GPU
    | {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 64, "seq_len": 64, "batch_size": 12, "max_steps": 2000}
    | {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    "gpt2": NANOGPT  # config/train_gpt2.py: 12 sequences at once, 5 * 8 times
    | {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "seq_len": 1024, "batch_size": 480}
    | {"num_microbatches": 40, "dtype": "bfloat16", "tokenizer": "gpt2", "vocab_size": 50257},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_numbers_of_nanogpts_recipe(name: str) -> None:
    values = flat(PRESETS[name])
    assert {key: values[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    assert values["decay_steps"] in (None, values["max_steps"])  # lr_decay_iters
    assert -(-values["vocab_size"] // values["vocab_multiple"]) * values["vocab_multiple"] in (65, 50304)


def test_the_presets_have_openais_sizes() -> None:
    for name, size in GPT2_SIZES.items():
        assert PRESETS[name].model == size
        assert PRESETS[name].optimizer == PRESETS["gpt2"].optimizer

"""gpt2_torch, gpt2_jax in both forms, and transformers compute the same function."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from support.implementations import (
    jax_gradients,
    jax_logits,
    jax_model,
    largest_divergence,
    relative_error,
    relative_l2,
    torch_gradients,
    torch_logits,
    torch_model,
    transformers_logits,
    transformers_model,
)
from support.models import SMALLEST, TINY, huggingface_directory, random_checkpoint, random_ids, random_state

import gpt2_jax
import gpt2_torch
from bridge import Checkpoint, GPT2Config
from bridge.config import ACTIVATIONS

FP64_RELATIVE = 1e-10  # rounding gives 1e-14; any difference in the mathematics gives 1e-7 or more
FP32_ABSOLUTE = 1e-5  # logits are of order 1, float32 rounds at 1e-7, and five layers accumulate rounding
FP32_DIVERGENCE = 1e-9  # nats; half the square of FP32_ABSOLUTE, with a margin
FP32_GRADIENT = 1e-5  # relative L2 of one parameter's gradient

THREE_LAYERS = replace(TINY, n_layer=3)

SWITCHES = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "tie_word_embeddings")
TWO_LAYERS = replace(TINY, n_layer=2)  # enough to see a wrong layer number; each layer costs time in 512 models
GRID = [
    replace(TWO_LAYERS, activation_function=activation, n_inner=n_inner, **dict(zip(SWITCHES, switches, strict=True)))
    for activation in ACTIVATIONS
    for switches in itertools.product((True, False), repeat=len(SWITCHES))
    for n_inner in (TINY.n_inner, None)
]
"""Every activation with every combination of options: 512 models."""

_WORDS = (
    *("-----", "---++", "--+-+", "-+--+", "+---+", "--++-", "-+-+-", "+--+-"),
    *("-++--", "+-+--", "++---", "----+", "---+-", "--+--", "-+---", "+----"),
)
_OPPOSITE = str.maketrans("+-", "-+")
COVERING = [
    replace(
        THREE_LAYERS,
        activation_function=activation,
        n_inner=TINY.n_inner if bits[-1] == "+" else None,
        **{switch: bit == "+" for switch, bit in zip(SWITCHES, bits, strict=False)},
    )
    for activation, word in zip(ACTIVATIONS, _WORDS, strict=True)
    for bits in (word, word.translate(_OPPOSITE))
]
"""32 of these models, with three layers. Every pair of values of two options occurs in at least one."""


def name_of(config: GPT2Config) -> str:
    on = [switch.replace("_attn", "") for switch in SWITCHES if getattr(config, switch)]
    return "-".join([config.activation_function, *on, f"n_inner={config.n_inner}"])


def float32_checkpoint(config: GPT2Config) -> Checkpoint:
    """Weights with a standard deviation of 0.1; those of GPT-2 are about 0.14.

    With the 0.2 of `random_state` and scores that are not divided by sqrt(K), attention is so sharp that rounding alone
    changes logits by 1.1e-5 between any two float32 implementations.
    """
    state = random_state(config)
    return Checkpoint.of({name: w if w.mean() > 0.5 else w / 2 for name, w in state.items()}, config)


def pairwise(answers: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray, np.ndarray]]:
    return [(f"{a} and {b}", answers[a], answers[b]) for a, b in itertools.combinations(answers, 2)]


def test_the_selection_covers_every_pair_of_options():
    fields = ("activation_function", "n_inner", *SWITCHES)
    for a, b in itertools.combinations(fields, 2):
        wanted = {(getattr(c, a), getattr(c, b)) for c in GRID}
        assert {(getattr(c, a), getattr(c, b)) for c in COVERING} == wanted, (a, b)


@pytest.mark.sampled(11)
@pytest.mark.parametrize("config", GRID, ids=name_of)
def test_logits_agree_in_float64(config: GPT2Config, x64: None):
    checkpoint, ids = random_checkpoint(config, np.float64), random_ids(config)
    answers = {
        "gpt2_torch": torch_logits(checkpoint, ids),
        "gpt2_jax": jax_logits(checkpoint, ids),
        "transformers": transformers_logits(checkpoint, ids),
    }
    for pair, a, b in pairwise(answers):
        assert relative_error(a, b) <= FP64_RELATIVE, pair


@pytest.mark.sampled(7)
@pytest.mark.parametrize("config", COVERING, ids=name_of)
def test_logits_of_the_scanned_form_agree_in_float64(config: GPT2Config, x64: None):
    checkpoint, ids = random_checkpoint(config, np.float64), random_ids(config)
    assert relative_error(jax_logits(checkpoint, ids, scan=True), torch_logits(checkpoint, ids)) <= FP64_RELATIVE


@pytest.mark.sampled(7)
@pytest.mark.parametrize("config", COVERING, ids=name_of)
def test_logits_agree_in_float32(config: GPT2Config):
    checkpoint, ids = float32_checkpoint(config), random_ids(config)
    answers = {
        "gpt2_torch": torch_logits(checkpoint, ids),
        "gpt2_jax": jax_logits(checkpoint, ids),
        "gpt2_jax scanned": jax_logits(checkpoint, ids, scan=True),
        "transformers": transformers_logits(checkpoint, ids),
    }
    for pair, a, b in pairwise(answers):
        assert np.abs(a - b).max() <= FP32_ABSOLUTE, pair
        assert largest_divergence(a, b) <= FP32_DIVERGENCE, pair


@pytest.mark.parametrize("config", [TINY, *COVERING[6:10]], ids=name_of)
def test_all_implementations_load_a_directory_and_agree(config: GPT2Config, tmp_path: Path):
    directory, ids = huggingface_directory(tmp_path / "model", config), random_ids(config)
    peer, report = transformers.GPT2LMHeadModel.from_pretrained(
        directory, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model, params = gpt2_jax.from_pretrained(directory)
    scanned, stacked = gpt2_jax.from_pretrained(directory, scan=True)
    with torch.no_grad():
        answers = {
            "gpt2_torch": gpt2_torch.GPT2.from_pretrained(directory)(torch.from_numpy(ids)).numpy(),
            "gpt2_jax": np.asarray(model.apply({"params": params}, ids)),
            "gpt2_jax scanned": np.asarray(scanned.apply({"params": stacked}, ids)),
            "transformers": peer(torch.from_numpy(ids)).logits.numpy(),
        }
    for pair, a, b in pairwise(answers):
        assert np.abs(a - b).max() <= FP32_ABSOLUTE, pair


def gradients(checkpoint: Checkpoint, ids: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    ours, peer = torch_model(checkpoint), transformers_model(checkpoint)
    peer_gradients = torch_gradients(peer, peer(torch.from_numpy(ids)).logits, ids)
    return {
        "gpt2_torch": torch_gradients(ours, ours(torch.from_numpy(ids)), ids),
        "gpt2_jax": jax_gradients(checkpoint, ids),
        "transformers": peer_gradients,
    }


def largest_gradient_error(answers: dict[str, dict[str, np.ndarray]]) -> float:
    """Parameters are compared as a whole, because the key bias, a third of c_attn.bias, has a true gradient of 0."""
    names = set(answers["gpt2_torch"])
    assert all(set(answer) == names for answer in answers.values())
    return max(
        relative_l2(answers[a][name], answers[b][name])
        for a, b in itertools.combinations(answers, 2)
        for name in sorted(names)
    )


@pytest.mark.sampled(7)
@pytest.mark.parametrize("config", COVERING, ids=name_of)
def test_gradients_of_every_parameter_agree_in_float64(config: GPT2Config, x64: None):
    answers = gradients(random_checkpoint(config, np.float64), random_ids(config))
    assert largest_gradient_error(answers) <= FP64_RELATIVE


@pytest.mark.parametrize("config", COVERING[::11], ids=name_of)
def test_gradients_of_the_scanned_form_agree_in_float64(config: GPT2Config, x64: None):
    checkpoint, ids = random_checkpoint(config, np.float64), random_ids(config)
    ours = torch_model(checkpoint)
    reference = torch_gradients(ours, ours(torch.from_numpy(ids)), ids)
    scanned = jax_gradients(checkpoint, ids, scan=True)
    assert largest_gradient_error({"gpt2_torch": reference, "gpt2_jax scanned": scanned}) <= FP64_RELATIVE


@pytest.mark.sampled(7)
@pytest.mark.parametrize("config", COVERING[::2], ids=name_of)
def test_gradients_of_every_parameter_agree_in_float32(config: GPT2Config):
    assert largest_gradient_error(gradients(float32_checkpoint(config), random_ids(config))) <= FP32_GRADIENT


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_model_without_biases_equals_one_whose_biases_are_zero(tied: bool, x64: None):
    config = replace(TINY, bias=False, tie_word_embeddings=tied)
    checkpoint, ids = random_checkpoint(config, np.float64), random_ids(config)
    with_biases = replace(config, bias=True)
    zeros = {name: np.zeros_like(array) for name, array in random_state(with_biases, np.float64).items()}
    peer = Checkpoint.of(zeros | dict(checkpoint.tensors), with_biases)
    answers = {
        "gpt2_torch": torch_logits(checkpoint, ids),
        "gpt2_jax": jax_logits(checkpoint, ids),
        "gpt2_jax scanned": jax_logits(checkpoint, ids, scan=True),
        "transformers": transformers_logits(peer, ids),
    }
    for pair, a, b in pairwise(answers):
        assert relative_error(a, b) <= FP64_RELATIVE, pair


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_padding_the_vocabulary_does_not_change_the_logits(scan: bool, tied: bool, x64: None):
    config = replace(TINY, tie_word_embeddings=tied)
    checkpoint, ids = random_checkpoint(config, np.float64), random_ids(config)
    padded = jax_logits(checkpoint, ids, scan=scan, vocab_multiple=64)
    assert padded.shape[-1] == config.vocab_size
    assert relative_error(padded, jax_logits(checkpoint, ids, scan=scan)) <= FP64_RELATIVE


@pytest.mark.sampled(7)
@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)], ids=str)
@pytest.mark.parametrize("form", [{}, {"jit": True}, {"scan": True}], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_logits_of_empty_batches_are_empty(shape: tuple[int, int], form: dict[str, Any], masked: bool) -> None:
    checkpoint, ids = random_checkpoint(SMALLEST), np.zeros(shape, np.int64)
    mask = np.ones(shape, np.int64) if masked else None
    ours = jax_logits(checkpoint, ids, mask, **form)
    assert ours.shape == torch_logits(checkpoint, ids, mask).shape == (*shape, SMALLEST.vocab_size)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("shape", [(2, 0), (0, 3)], ids=str)
def test_losses_of_empty_batches_equal_those_of_torch(shape: tuple[int, int]) -> None:
    checkpoint, ids = random_checkpoint(SMALLEST), np.zeros(shape, np.int64)
    model, params = jax_model(checkpoint)
    logits = jax_logits(checkpoint, ids), torch.from_numpy(np.array(jax_logits(checkpoint, ids)))
    assert (
        gpt2_jax.cross_entropy(logits[0], ids).shape == gpt2_torch.cross_entropy(logits[1], torch.from_numpy(ids)).shape
    )
    assert np.isnan(gpt2_jax.next_token_loss(logits[0], ids))
    assert gpt2_torch.next_token_loss(logits[1], torch.from_numpy(ids)).isnan()  # the mean of an empty tensor
    batch = {"input_ids": ids, "labels": ids}
    total, gradients = jax.value_and_grad(lambda p: gpt2_jax.summed_loss(model, p, batch))(params)
    assert total == 0.0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))

"""The table of parameters, compared with the model that transformers builds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from support.models import TINY

import bridge
from bridge import GPT2_SIZES, GPT2Config


def shapes_of_transformers(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the state_dict of GPT2LMHeadModel, on the meta device."""
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config.to_hf()))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("config", [TINY, GPT2_SIZES["gpt2"]], ids=["tiny", "gpt2"])
def test_names_shapes_and_order_are_those_of_transformers(config: GPT2Config, tied: bool) -> None:
    config = replace(config, tie_word_embeddings=tied)
    theirs = shapes_of_transformers(config)
    if tied:
        assert theirs.pop("lm_head.weight") == theirs["transformer.wte.weight"]
    ours = {p.torch_name: p.torch_shape for p in bridge.parameters(config)}
    assert list(ours.items()) == [(name.removeprefix("transformer."), shape) for name, shape in theirs.items()]


def test_every_flax_path_is_used_once_and_splits_only_the_heads() -> None:
    rows = bridge.parameters(replace(TINY, tie_word_embeddings=False))
    assert len({p.flax_path for p in rows}) == len({p.torch_name for p in rows}) == len(rows)
    split = {p.torch_name.split(".", 2)[-1] for p in rows if p.flax_shape != p.torch_shape}
    assert split == {"attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight"}
    assert all(math.prod(p.flax_shape) == math.prod(p.torch_shape) for p in rows)


def test_the_split_shapes_are_query_key_value_heads_and_head_size() -> None:
    four_heads = replace(TINY, n_head=4)  # three heads could be confused with query, key and value
    shapes = {"/".join(p.flax_path): p.flax_shape for p in bridge.parameters(four_heads)}
    assert shapes["h_4/attn/c_attn/kernel"] == (48, 3, 4, 12)
    assert shapes["h_4/attn/c_attn/bias"] == (3, 4, 12)
    assert shapes["h_4/attn/c_proj/kernel"] == (4, 12, 48)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_count_is_the_sum_over_the_table(tied: bool, bias: bool) -> None:
    config = replace(TINY, tie_word_embeddings=tied, bias=bias)
    rows = bridge.parameters(config)
    assert bridge.num_parameters(config) == sum(math.prod(p.torch_shape) for p in rows)
    assert ("lm_head.weight" in {p.torch_name for p in rows}) is not tied
    assert any(p.torch_name.endswith(".bias") for p in rows) is bias


@pytest.mark.parametrize(
    ("size", "multiple", "padded"),
    [(257, 1, 257), (257, 64, 320), (257, 128, 384), (256, 64, 256), (50257, 128, 50304)],
)
def test_the_vocabulary_is_rounded_up_to_a_multiple(size: int, multiple: int, padded: int) -> None:
    assert bridge.padded_vocab_size(size, multiple) == padded


@pytest.mark.parametrize("multiple", [0, -64])
def test_a_multiple_below_one_is_refused(multiple: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of {multiple}"):
        bridge.padded_vocab_size(257, multiple)


def test_weight_decay_acts_only_on_projections_and_embeddings() -> None:
    decays = {p.torch_name: p.decays for p in bridge.parameters(replace(TINY, tie_word_embeddings=False))}
    assert len(decays) == 5 + 12 * TINY.n_layer
    assert sum(decays.values()) == 3 + 4 * TINY.n_layer
    assert all(decays[name] for name in ("wte.weight", "wpe.weight", "lm_head.weight", "h.4.mlp.c_fc.weight"))
    assert not any(decays[name] for name in ("ln_f.weight", "h.0.ln_1.weight", "h.3.attn.c_attn.bias", "ln_f.bias"))

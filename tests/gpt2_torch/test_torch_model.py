"""The reference by itself: initialization, dropout, errors, and dtypes."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from support.models import TINY, random_checkpoint, random_ids

import bridge
from bridge import GPT2Config
from gpt2_torch import GPT2, model_from_checkpoint
from gpt2_torch.ops.attention import attention

STANDARD_ERRORS = 4.5  # a correct statistic passes with probability 0.99999; seeds are fixed

IDS = torch.from_numpy(random_ids(TINY))


def random_model(config: GPT2Config = TINY) -> GPT2:
    return model_from_checkpoint(random_checkpoint(config))


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_parameters_are_those_of_the_table(tied: bool, bias: bool):
    config = replace(TINY, tie_word_embeddings=tied, bias=bias)
    found = {name: tuple(tensor.shape) for name, tensor in GPT2(config).state_dict().items()}
    assert list(found.items()) == [(p.torch_name, p.torch_shape) for p in bridge.parameters(config)]


@pytest.mark.parametrize("initializer_range", [0.02, 0.05])
def test_initial_weights_have_the_published_deviations(initializer_range: float):
    torch.manual_seed(0)
    config = replace(TINY, initializer_range=initializer_range, tie_word_embeddings=False)
    for name, tensor in GPT2(config).state_dict().items():
        if name.endswith(".bias"):
            assert (tensor == 0).all(), name
        elif "ln_" in name:
            assert (tensor == 1).all(), name
        else:
            std = initializer_range / (math.sqrt(2 * config.n_layer) if "c_proj" in name else 1)
            assert abs(tensor.mean()) <= STANDARD_ERRORS * std / math.sqrt(tensor.numel()), name
            assert abs(tensor.std() / std - 1) <= STANDARD_ERRORS / math.sqrt(2 * tensor.numel()), name


def test_dropout_is_off_by_default_even_in_training():
    assert (GPT2Config().embd_pdrop, GPT2Config().attn_pdrop, GPT2Config().resid_pdrop) == (0.0, 0.0, 0.0)
    model = random_model().train()
    assert torch.equal(model(IDS), model(IDS))


@pytest.mark.parametrize("place", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_each_dropout_alone_applies_in_training_only(place: str):
    model, plain = random_model(replace(TINY, **{place: 0.3})), random_model()
    assert not model.training
    assert torch.equal(model(IDS), plain(IDS))
    model.train()
    torch.manual_seed(1)
    first = model(IDS)
    assert not torch.equal(first, model(IDS))
    torch.manual_seed(1)
    assert torch.equal(first, model(IDS))
    assert not torch.allclose(first, plain(IDS))


@pytest.mark.parametrize("place", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_rows_of_a_batch_drop_independently(place: str):
    model = random_model(replace(TINY, **{place: 0.5})).train()
    torch.manual_seed(2)
    twice = model(IDS[:1].repeat(2, 1))
    assert not torch.allclose(twice[0], twice[1])


def test_attention_dropout_keeps_the_mean_and_drops_at_its_rate():
    rate, queries = 0.2, 20_000
    ones = torch.ones(queries, 1, 1, 1)
    torch.manual_seed(3)
    # With one key there is one weight, 1, so the output is 0 or 1 / (1 - rate).
    out = attention(ones, ones, ones, None, is_causal=False, scale=1.0, dropout_rate=rate)
    dropped = out == 0
    assert torch.allclose(out[~dropped], torch.tensor(1 / (1 - rate)))
    error = math.sqrt(rate * (1 - rate) / queries)
    assert abs(dropped.float().mean() - rate) <= STANDARD_ERRORS * error
    assert abs(out.mean() - 1) <= STANDARD_ERRORS * error / (1 - rate)


@pytest.mark.parametrize("wrong", [-1, TINY.vocab_size])
def test_an_id_outside_the_vocabulary_is_an_index_error(wrong: int):
    ids = IDS.clone()
    ids[1, 4] = wrong
    with pytest.raises(IndexError, match=f"{wrong}.*0 to 256"):
        random_model()(ids)


def test_a_sequence_longer_than_the_positions_is_refused():
    model = random_model()
    assert model(torch.zeros(1, TINY.n_positions, dtype=torch.long)).shape[1] == TINY.n_positions
    with pytest.raises(ValueError, match="n_positions=40"):
        model(torch.zeros(1, TINY.n_positions + 1, dtype=torch.long))


@pytest.mark.parametrize("shape", [(2, 16), (1, 17), (17,), (2, 1, 17)], ids=str)
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="attention_mask"):
        random_model()(IDS, torch.ones(shape, dtype=torch.long))


def test_ids_must_have_a_batch_axis():
    with pytest.raises(ValueError, match=r"\[batch, length\]"):
        random_model()(IDS[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_logits_have_the_dtype_of_the_weights(dtype: torch.dtype):
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    logits = random_model().to(dtype)(IDS, mask)
    assert logits.dtype == dtype
    assert logits.isfinite().all()


def test_upcast_attention_ignores_autocast():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (3 * torch.randn(2, 7, TINY.n_head, TINY.head_size, generator=generator) for _ in range(3))
    wide = attention(q, k, v, None, is_causal=True, scale=1.0, upcast=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(q, k, v, None, is_causal=True, scale=1.0, upcast=True), wide)
        assert not torch.equal(attention(q, k, v, None, is_causal=True, scale=1.0).float(), wide)


def test_upcast_attention_computes_half_precision_in_float32():
    x = torch.randn(2, 7, TINY.n_embd, generator=torch.Generator().manual_seed(0)).bfloat16()
    upcast, plain = (
        random_model(replace(TINY, reorder_and_upcast_attn=switch)).h[0].attn.bfloat16() for switch in (True, False)
    )
    q, k, v = (part.float() for part in upcast.c_attn(x, x, x))
    expected = attention(q, k, v, None, is_causal=True, scale=1 / math.sqrt(TINY.head_size)).bfloat16()
    assert torch.equal(upcast(x, x, x, is_causal=True), upcast.c_proj(expected.flatten(-2)))
    assert not torch.equal(upcast(x, x, x, is_causal=True), plain(x, x, x, is_causal=True))


def test_a_model_can_be_copied_and_pickled():
    model = random_model()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS), model(IDS))
        other.load_state_dict(random_model().state_dict())

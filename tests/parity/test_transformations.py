"""What both backends compute beside logits and gradients: second derivatives, hidden states, and attention weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.implementations import jax_model, torch_model, transformers_model
from support.models import TINY, random_checkpoint, random_ids
from torch.func import functional_call, grad, jvp

import bridge
import gpt2_jax
import gpt2_torch
from bridge import Checkpoint

CONFIG = replace(TINY, n_layer=2, scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False)
IDS = random_ids(CONFIG, batch=3)
MASK = np.ones_like(IDS)
MASK[0, :4] = MASK[1, -5:] = 0
SEGMENTS = np.repeat(np.arange(IDS.shape[1])[None] // 6 + 1, 3, axis=0)
ROUNDING = 1e-12
"""Float64, values of order 1."""
INPUTS: Mapping[str, Mapping[str, np.ndarray]] = {
    "ids": {},
    "mask": {"attention_mask": MASK},
    "segments": {"segment_ids": SEGMENTS},
}


@pytest.fixture
def checkpoint(x64: None) -> Checkpoint:
    return random_checkpoint(CONFIG, np.float64)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(np.asarray(found) - np.asarray(expected)).max() <= ROUNDING


def torch_hessian_vector_product(checkpoint: Checkpoint, direction: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    model, ids = torch_model(checkpoint), torch.from_numpy(IDS)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def gradient(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return grad(lambda p: gpt2_torch.next_token_loss(functional_call(model, p, (ids,)), ids))(parameters)

    tangents = {name: torch.from_numpy(array) for name, array in direction.items()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the fused kernels have no forward mode
        product = jvp(gradient, (parameters,), (tangents,))[1]
    return {name: tensor.numpy() for name, tensor in product.items()}


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # PyTorch's own use
def test_hessian_vector_products_agree(checkpoint: Checkpoint) -> None:
    rng = np.random.default_rng(1)
    direction = {name: rng.normal(size=array.shape) for name, array in checkpoint.tensors.items()}
    model, params = jax_model(checkpoint)

    def loss(params: dict) -> jax.Array:
        return gpt2_jax.next_token_loss(model.apply({"params": params}, IDS), jnp.asarray(IDS))

    tangents = bridge.to_flax(direction, CONFIG)
    product = jax.jit(lambda p, v: jax.jvp(jax.grad(loss), (p,), (v,))[1])(params, tangents)
    expected = torch_hessian_vector_product(checkpoint, direction)
    found = bridge.to_torch(product, CONFIG)
    assert {*found} == {*expected}
    for name, array in found.items():
        assert np.abs(array - expected[name]).max() <= 1e-10 * np.abs(expected[name]).max(), name


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_hidden_states_and_attention_weights_agree(inputs: Mapping[str, np.ndarray], checkpoint: Checkpoint) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.no_grad():
        expected = gpt2_torch.model_outputs(torch_model(checkpoint), torch.from_numpy(IDS), **tensors)
    found = gpt2_jax.model_outputs(*jax_model(checkpoint), IDS, **inputs)
    assert len(found.hidden_states) == CONFIG.n_layer + 1
    assert len(found.attentions) == CONFIG.n_layer
    leaves = jax.tree.leaves(jax.tree.map(lambda x: x.numpy(), tuple(expected)))
    for array, wanted in zip(jax.tree.leaves(tuple(found)), leaves, strict=True):
        assert_same(array, wanted)


def test_hidden_states_and_attention_weights_are_those_of_transformers(checkpoint: Checkpoint) -> None:
    with torch.no_grad():
        peer = transformers_model(checkpoint)(torch.from_numpy(IDS), output_hidden_states=True, output_attentions=True)
        own = gpt2_torch.model_outputs(torch_model(checkpoint), torch.from_numpy(IDS))
    for expected, found in ((peer.hidden_states, own.hidden_states), (peer.attentions, own.attentions)):
        for wanted, tensor in zip(expected, found, strict=True):
            assert_same(tensor.numpy(), wanted.numpy())
    assert_same(own.logits.numpy(), peer.logits.numpy())


def test_embeddings_replace_ids(checkpoint: Checkpoint) -> None:
    torch_side, (model, params) = torch_model(checkpoint), jax_model(checkpoint)
    embeddings = np.asarray(checkpoint.tensors["wte.weight"])[IDS]
    with torch.no_grad():
        expected = torch_side(torch.from_numpy(IDS), torch.from_numpy(MASK)).numpy()
        given = {"attention_mask": torch.from_numpy(MASK), "inputs_embeds": torch.from_numpy(embeddings)}
        assert_same(torch_side(**given).numpy(), expected)
    found = model.apply({"params": params}, attention_mask=MASK, inputs_embeds=embeddings)
    assert_same(found, expected)


def test_invalid_embeddings_are_refused() -> None:
    checkpoint = random_checkpoint(CONFIG)
    torch_side, (model, params) = torch_model(checkpoint), jax_model(checkpoint)
    ids, embeddings = IDS[:1, :3], np.zeros((1, 3, CONFIG.n_embd), np.float32)

    def call_torch(**inputs: np.ndarray) -> object:
        return torch_side(**{name: torch.from_numpy(array) for name, array in inputs.items()})

    def call_jax(**inputs: np.ndarray) -> object:
        return model.apply({"params": params}, **inputs)

    for call in (call_torch, call_jax):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            call()
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            call(input_ids=ids, inputs_embeds=embeddings)
        with pytest.raises(ValueError, match=r"\[batch, length, 48\], not \(1, 3, 47\)"):
            call(inputs_embeds=embeddings[..., 1:])
        with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 2\), but inputs_embeds has \(1, 3, 48\)"):
            call(inputs_embeds=embeddings, attention_mask=ids[:, 1:])

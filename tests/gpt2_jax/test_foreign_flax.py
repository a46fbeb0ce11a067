"""Flax GPT-2s of other repositories, restated here, become checkpoints that compute the same logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze
from support.models import TINY, random_ids, random_state

import bridge
import gpt2_jax
from bridge import Checkpoint, ConversionError

CONFIG = replace(TINY, n_inner=4 * TINY.n_embd)
ERROR = 2e-5  # of logits around 10 in float32, summed in another order
EPSILON_ERROR = 1e-4  # nanoGPT-jax's last LayerNorm has Flax's epsilon, 1e-6; the variance here is about 1


def attend(qkv_BTC: jax.Array) -> jax.Array:
    """Causal attention of both repositories: q, k and v are consecutive thirds, and heads are consecutive columns."""
    q, k, v = (x.reshape(*x.shape[:2], CONFIG.n_head, -1).swapaxes(1, 2) for x in jnp.split(qkv_BTC, 3, axis=-1))
    scores = q @ k.swapaxes(-2, -1) / np.sqrt(k.shape[-1])
    mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    y = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)) @ v
    return y.swapaxes(1, 2).reshape(*y.shape[:1], y.shape[2], -1)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = attend(nn.Dense(3 * CONFIG.n_embd, name="c_attn")(x))
        return nn.Dense(CONFIG.n_embd, name="c_proj")(x)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.gelu(nn.Dense(4 * CONFIG.n_embd, name="c_fc")(x), approximate=True)
        return nn.Dense(CONFIG.n_embd, name="c_proj")(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + Attention(name="attn")(nn.LayerNorm(1e-5, name="ln_1")(x))
        return x + MLP(name="mlp")(nn.LayerNorm(1e-5, name="ln_2")(x))


class GPT(nn.Module):
    """The names and shapes of nanoGPT-jax and gpt-jax, which differ in the names of the layers and in an epsilon."""

    layer_name: str
    last_epsilon: float

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        wte = nn.Embed(CONFIG.vocab_size, CONFIG.n_embd, name="wte")
        x = wte(ids) + nn.Embed(CONFIG.n_positions, CONFIG.n_embd, name="wpe")(jnp.arange(ids.shape[1])[None])
        for i in range(CONFIG.n_layer):
            x = Block(name=self.layer_name.format(i))(x)
        return wte.attend(nn.LayerNorm(self.last_epsilon, name="ln_f")(x))


NANOGPT_JAX, GPT_JAX = GPT("h_{}", 1e-6), GPT("{}", 1e-5)


def random_params(model: GPT) -> dict[str, Any]:
    """Return the tree that the model's `init` makes, with random values in every leaf."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(scale=0.2, size=leaf.shape).astype(np.float32), shapes)


def assert_same_logits(model: GPT, params: Mapping[str, Any], checkpoint: Checkpoint, error: float) -> None:
    ids = jnp.asarray(random_ids(CONFIG))
    expected = model.apply({"params": params}, ids)
    ours, own_params = gpt2_jax.model_from_checkpoint(checkpoint)
    assert np.abs(ours.apply({"params": own_params}, ids) - expected).max() < error
    assert np.abs(expected).max() > 1


def test_nanogpt_jax_becomes_a_checkpoint() -> None:
    params = random_params(NANOGPT_JAX)
    checkpoint = Checkpoint.of(bridge.to_torch(freeze(params), CONFIG), CONFIG)
    assert_same_logits(NANOGPT_JAX, params, checkpoint, EPSILON_ERROR)


def test_gpt_jax_becomes_a_checkpoint_after_its_layers_are_renamed() -> None:
    params = random_params(GPT_JAX)
    with pytest.raises(ConversionError, match="'0/attn/c_attn/bias' is not a parameter of this model"):
        bridge.to_torch(params, replace(CONFIG, n_layer=1))
    renamed = {f"h_{name}" if name.isdigit() else name: tree for name, tree in params.items()}
    checkpoint = Checkpoint.of(bridge.to_torch(renamed, CONFIG), CONFIG)
    assert_same_logits(GPT_JAX, params, checkpoint, ERROR)


def test_the_restated_models_have_the_flat_shapes() -> None:
    """Of the published modules: `nn.Dense(3 * n_embd)`."""
    kernel = random_params(GPT_JAX)["3"]["attn"]["c_attn"]["kernel"]
    assert kernel.shape == (48, 144)
    assert {*random_params(NANOGPT_JAX)} == {"wte", "wpe", "ln_f", *(f"h_{i}" for i in range(5))}
    assert random_state(CONFIG)["h.3.attn.c_attn.weight"].shape == kernel.shape

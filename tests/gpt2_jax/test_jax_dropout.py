"""Dropout in the port: where it applies, that it depends on the key, and its statistics."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.implementations import jax_model
from support.models import TINY, random_checkpoint, random_ids

from bridge import GPT2Config
from gpt2_jax import GPT2
from gpt2_jax.ops.attention import attention

STANDARD_ERRORS = 4.5  # a correct statistic passes with probability 0.99999; keys are fixed

SMALL = replace(TINY, n_layer=2)  # enough for layers to differ; more layers take longer to compile
IDS = random_ids(SMALL, batch=4)
PLACES = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
each_place = pytest.mark.parametrize("place", PLACES)
each_form = pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])


def random_key(seed: int) -> jax.Array:
    """Return a key of the generator that compiles in half the time of JAX's default."""
    return jax.random.key(seed, impl="rbg")


@functools.partial(jax.jit, static_argnums=0)
def dropped(model: GPT2, params: dict[str, Any], seed: int) -> jax.Array:
    return model.apply({"params": params}, IDS, deterministic=False, rngs={"dropout": random_key(seed)})


@each_form
def test_it_is_off_by_default(scan: bool):
    assert [getattr(GPT2Config(), place) for place in PLACES] == [0.0, 0.0, 0.0]
    plain, params = jax_model(random_checkpoint(SMALL), scan=scan)
    expected = plain.apply({"params": params}, IDS)
    model = GPT2(replace(SMALL, **dict.fromkeys(PLACES, 0.3)), scan=scan)
    np.testing.assert_array_equal(model.apply({"params": params}, IDS), expected)
    without_key = plain.apply({"params": params}, IDS, deterministic=False)
    np.testing.assert_array_equal(without_key, expected)


@each_form
@each_place
def test_each_dropout_alone_applies_and_depends_on_the_key(place: str, scan: bool):
    plain, params = jax_model(random_checkpoint(SMALL), scan=scan)
    model = GPT2(replace(SMALL, **{place: 0.3}), scan=scan)
    first = dropped(model, params, seed=1)
    np.testing.assert_array_equal(dropped(model, params, seed=1), first)
    assert not np.allclose(dropped(model, params, seed=2), first)
    assert not np.allclose(plain.apply({"params": params}, IDS), first)


@each_form
@each_place
def test_a_missing_key_is_a_clear_error(place: str, scan: bool):
    _, params = jax_model(random_checkpoint(SMALL), scan=scan)
    model = GPT2(replace(SMALL, **{place: 0.3}), scan=scan)
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        model.apply({"params": params}, IDS, deterministic=False)


def test_attention_by_itself_requires_a_key():
    ones = jnp.ones((1, 2, 1, 1))
    with pytest.raises(ValueError, match=r'rngs=\{"dropout": key\}'):
        attention(ones, ones, ones, None, is_causal=False, scale=1.0, dropout_rate=0.1)


def test_attention_dropout_keeps_the_mean_and_drops_at_its_rate():
    rate, queries = 0.2, 20_000
    ones = jnp.ones((queries, 1, 1, 1))
    # With one key there is one weight, 1, so the output is 0 or 1 / (1 - rate).
    out = attention(ones, ones, ones, None, is_causal=False, scale=1.0, dropout_rate=rate, dropout_key=random_key(3))
    hidden = out == 0
    np.testing.assert_allclose(out[~hidden], 1 / (1 - rate), rtol=1e-6)  # one float32 division
    error = math.sqrt(rate * (1 - rate) / queries)
    assert abs(hidden.mean() - rate) <= STANDARD_ERRORS * error
    assert abs(out.mean() - 1) <= STANDARD_ERRORS * error / (1 - rate)


@each_form
def test_every_sublayer_of_every_layer_draws_its_own_mask(scan: bool):
    """Each sublayer adds 1 everywhere, so with a rate of 1/2 their sum is twice a binomial variable.

    If the two layers shared their masks, the number of kept values would always be even.
    """
    config = replace(SMALL, resid_pdrop=0.5)
    model = GPT2(config, scan=scan)
    shapes = jax.eval_shape(model.init, random_key(0), IDS)["params"]
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 1 if [k.key for k in path][-2:] == ["c_proj", "bias"] else leaf, params
    )
    x = jnp.zeros((20, 10, config.n_embd))

    def layers(model: GPT2, x: jax.Array) -> jax.Array:
        apply_layer = model._layer_function(mask=None, segment_ids=None, deterministic=False)
        return model._scan_layers(apply_layer, x) if scan else model._loop_layers(apply_layer, x)

    apply = jax.jit(functools.partial(model.apply, method=layers))
    out = apply({"params": params}, x, rngs={"dropout": random_key(5)})
    kept = np.asarray(out / 2).astype(int)
    frequencies = np.bincount(kept.ravel(), minlength=5) / kept.size
    binomial = np.array([math.comb(4, n) / 16 for n in range(5)])
    errors = np.sqrt(binomial * (1 - binomial) / kept.size)
    assert (np.abs(frequencies - binomial) <= STANDARD_ERRORS * errors).all(), frequencies

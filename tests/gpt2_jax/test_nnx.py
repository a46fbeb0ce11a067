"""The NNX module: it has the parameters, logits and gradients of the Linen model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.implementations import jax_model
from support.models import TINY, random_checkpoint, random_ids

import bridge
from bridge.storage.trees import flatten
from gpt2_jax import model_from_checkpoint, next_token_loss
from gpt2_jax.nnx import GPT2

CONFIG = replace(TINY, n_layer=1)
IDS = jnp.asarray(random_ids(CONFIG))


@pytest.fixture(scope="module")
def twin() -> GPT2:
    return GPT2.from_params(*jax_model(random_checkpoint(CONFIG)))


def test_parameters_have_the_paths_of_the_table(twin: GPT2) -> None:
    found = {path: variable.shape for path, variable in nnx.to_flat_state(nnx.state(twin))}
    assert found == {p.flax_path: p.flax_shape for p in bridge.parameters(CONFIG)}
    assert twin.h_0.attn.c_attn.kernel.shape == (48, 3, 3, 16)


def test_logits_and_parameters_are_those_of_the_linen_model(twin: GPT2) -> None:
    model, params = jax_model(random_checkpoint(CONFIG))
    np.testing.assert_array_equal(twin(IDS), model.apply({"params": params}, IDS))
    for name, tensor in bridge.to_torch(twin.params, CONFIG).items():
        np.testing.assert_array_equal(tensor, random_checkpoint(CONFIG).tensors[name])


def test_random_parameters_are_those_of_init() -> None:
    twin = nnx.eval_shape(lambda: GPT2(CONFIG, rngs=nnx.Rngs(0), scan=True, param_dtype=jnp.bfloat16))
    shapes = jax.eval_shape(twin.linen.init, jax.random.key(0), IDS)["params"]
    found = {path: (leaf.shape, leaf.dtype) for path, leaf in flatten(twin.params).items()}
    assert found == {path: (leaf.shape, leaf.dtype) for path, leaf in flatten(shapes).items()}
    with pytest.raises(ValueError, match="either rngs"):
        GPT2(CONFIG)


def test_a_training_step_of_nnx_is_that_of_optax() -> None:
    model, params = model_from_checkpoint(random_checkpoint(CONFIG))
    twin, tx = GPT2.from_params(model, params), optax.sgd(1e-2)
    optimizer = nnx.Optimizer(twin, tx, wrt=nnx.Param)

    @nnx.jit
    def step(twin: GPT2, optimizer: nnx.Optimizer) -> jax.Array:
        loss, gradients = nnx.value_and_grad(lambda m: next_token_loss(m(IDS), IDS))(twin)
        optimizer.update(twin, gradients)
        return loss

    @jax.jit
    def expected(params: Any) -> tuple[jax.Array, Any]:
        loss, gradients = jax.value_and_grad(lambda p: next_token_loss(model.apply({"params": p}, IDS), IDS))(params)
        return loss, optax.apply_updates(params, tx.update(gradients, tx.init(params))[0])

    loss, updated = expected(params)
    np.testing.assert_allclose(step(twin, optimizer), loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), twin.params, updated)


def test_training_mode_applies_dropout() -> None:
    config = replace(CONFIG, resid_pdrop=0.5)
    model, params = jax_model(random_checkpoint(config))
    twin = GPT2.from_params(model, params)
    plain = twin(IDS)
    twin.train()
    with pytest.raises(ValueError, match="pass rngs"):
        twin(IDS)
    first, again, other = (twin(IDS, rngs=nnx.Rngs(dropout=seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first, plain)
    twin.eval()
    np.testing.assert_array_equal(twin(IDS), plain)


def test_training_mode_without_dropout_needs_no_random_numbers() -> None:
    config = replace(CONFIG, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    twin = GPT2.from_params(*jax_model(random_checkpoint(config)))
    plain = twin(IDS)
    twin.train()
    np.testing.assert_array_equal(twin(IDS), plain)

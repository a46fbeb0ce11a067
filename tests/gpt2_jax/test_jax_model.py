"""The port by itself: initialization, purity, dtypes, and errors."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.implementations import jax_model
from support.models import TINY, random_checkpoint, random_ids

import bridge
from bridge.storage.trees import flatten
from gpt2_jax import GPT2
from gpt2_jax.model import positions
from gpt2_jax.ops.attention import attention

STANDARD_ERRORS = 4.5  # a correct statistic passes with probability 0.99999; seeds are fixed
BF16_ABSOLUTE = 0.15  # logits of order 1 after two layers at 8 bits of mantissa

SMALL = replace(TINY, n_layer=2)  # enough for layers to differ; more layers take longer to compile
IDS = random_ids(SMALL, batch=4)
each_form = pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])


def random_key(seed: int) -> jax.Array:
    """Return a key of the generator that compiles in half the time of JAX's default."""
    return jax.random.key(seed, impl="rbg")


def random_model(**kwargs: Any) -> tuple[GPT2, dict[str, Any]]:
    return jax_model(random_checkpoint(SMALL), **kwargs)


def expected_shapes(config: bridge.GPT2Config, *, scan: bool, rows: int) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for p in bridge.parameters(config):
        shape = (rows, *p.flax_shape[1:]) if p.torch_name in ("wte.weight", "lm_head.weight") else p.flax_shape
        stacked = scan and p.layer is not None
        path = ("h", *p.flax_path[1:]) if stacked else p.flax_path
        shapes["/".join(path)] = (config.n_layer, *shape) if stacked else shape
    return shapes


@each_form
@pytest.mark.parametrize(("tied", "bias", "vocab_multiple"), [(True, True, 1), (False, True, 64), (False, False, 1)])
def test_parameters_are_those_of_the_table(tied: bool, bias: bool, vocab_multiple: int, scan: bool):
    config = replace(SMALL, tie_word_embeddings=tied, bias=bias)
    model = GPT2(config, scan=scan, vocab_multiple=vocab_multiple)
    variables = jax.eval_shape(model.init, random_key(0), IDS)
    found = {path: leaf.shape for path, leaf in flatten(variables["params"]).items()}
    assert found == expected_shapes(config, scan=scan, rows=320 if vocab_multiple == 64 else config.vocab_size)


@pytest.mark.sampled(2)
@each_form
@pytest.mark.parametrize("initializer_range", [0.02, 0.05])
def test_initial_weights_have_the_published_deviations(initializer_range: float, scan: bool):
    config = replace(SMALL, initializer_range=initializer_range, tie_word_embeddings=False)
    params = jax.jit(GPT2(config, scan=scan).init)(random_key(0), IDS)["params"]
    for path, leaf in flatten(params).items():
        if path.endswith("bias"):
            assert (leaf == 0).all(), path
        elif path.endswith("scale"):
            assert (leaf == 1).all(), path
        else:
            std = initializer_range / (math.sqrt(2 * config.n_layer) if "c_proj" in path else 1)
            assert abs(leaf.mean()) <= STANDARD_ERRORS * std / math.sqrt(leaf.size), path
            assert abs(leaf.std() / std - 1) <= STANDARD_ERRORS / math.sqrt(2 * leaf.size), path


def test_scanned_layers_are_initialised_differently():
    kernel = jax.jit(GPT2(SMALL, scan=True).init)(random_key(0), IDS)["params"]["h"]["mlp"]["c_fc"]["kernel"]
    correlation = np.corrcoef(kernel.reshape(SMALL.n_layer, -1)) - np.eye(SMALL.n_layer)
    assert np.abs(correlation).max() <= STANDARD_ERRORS / math.sqrt(kernel[0].size)


@each_form
def test_a_call_returns_logits_and_changes_nothing_else(scan: bool):
    config = replace(SMALL, attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1)
    model = GPT2(config, scan=scan)
    rngs = {"params": random_key(0), "dropout": random_key(1)}
    assert set(jax.eval_shape(functools.partial(model.init, deterministic=False), rngs, IDS)) == {"params"}
    variables = {"params": random_model(scan=scan)[1]}
    before = jax.tree.map(np.array, variables)
    apply = jax.jit(model.apply, static_argnames=("deterministic", "mutable"))
    logits = apply(variables, IDS)
    assert isinstance(logits, jax.Array)
    assert logits.shape == (*IDS.shape, SMALL.vocab_size)
    for deterministic in (True, False):
        again, changed = apply(variables, IDS, deterministic=deterministic, rngs=rngs, mutable=True)
        assert set(changed) == {"params"}
        assert jax.tree.all(jax.tree.map(np.array_equal, changed["params"], before["params"]))
    np.testing.assert_array_equal(apply(variables, IDS), logits)
    assert again.shape == logits.shape


@each_form
def test_computation_and_parameters_have_their_own_dtypes(scan: bool):
    ck = random_checkpoint(SMALL)
    wide, params = jax_model(ck, scan=scan)
    narrow = GPT2(SMALL, dtype=jnp.bfloat16, scan=scan)
    logits = jax.jit(narrow.apply)({"params": params}, IDS)
    assert logits.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert np.abs(logits.astype(np.float32) - wide.apply({"params": params}, IDS)).max() <= BF16_ABSOLUTE
    gradient = jax.grad(lambda p: narrow.apply({"params": p}, IDS).astype(jnp.float32).sum())
    gradients = jax.eval_shape(gradient, params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients))

    stored_narrow = GPT2(SMALL, param_dtype=jnp.bfloat16, scan=scan)
    variables = jax.jit(stored_narrow.init)(random_key(0), IDS)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(variables))
    assert jax.eval_shape(stored_narrow.apply, variables, IDS).dtype == jnp.float32


def test_scores_of_narrow_heads_are_computed_in_float32():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(3 * rng.normal(size=(2, 7, 3, 16)), jnp.bfloat16) for _ in range(3))
    wide = attention(*(x.astype(jnp.float32) for x in (q, k, v)), None, is_causal=True, scale=1.0)
    narrow = attention(q, k, v, None, is_causal=True, scale=1.0)
    assert narrow.dtype == jnp.bfloat16
    # Scores reach 50, where the spacing of bfloat16 is 0.25; rounded scores would change the outputs by 20 %.
    steps = np.abs(narrow.astype(np.float32) - wide) / np.abs(wide).max()
    assert steps.max() <= 2 * float(jnp.finfo(jnp.bfloat16).eps)


@pytest.mark.parametrize("wrong", [-1, SMALL.vocab_size])
def test_an_id_outside_the_vocabulary_is_an_index_error(wrong: int):
    model, params = random_model()
    ids = IDS.copy()
    ids[1, 4] = wrong
    for given in (ids, jnp.asarray(ids)):
        with pytest.raises(IndexError, match=f"{wrong}.*0 to 256"):
            model.apply({"params": params}, given)


@each_form
def test_an_id_outside_the_vocabulary_makes_its_row_nan_inside_jit(scan: bool):
    model, params = random_model(scan=scan)
    ids = IDS.copy()
    ids[1, 4] = SMALL.vocab_size
    logits = jax.jit(model.apply)({"params": params}, ids)
    assert jnp.isnan(logits[1]).all()
    assert jnp.isfinite(logits[0]).all()


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_sequence_longer_than_the_positions_is_refused(jitted: bool):
    model, params = random_model()
    apply = jax.jit(model.apply) if jitted else model.apply
    assert apply({"params": params}, jnp.zeros((1, SMALL.n_positions), int)).shape[1] == SMALL.n_positions
    with pytest.raises(ValueError, match="n_positions=40"):
        apply({"params": params}, jnp.zeros((1, SMALL.n_positions + 1), int))


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("shape", [(4, 16), (1, 17), (17,), (4, 1, 17)], ids=str)
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...], jitted: bool):
    model, params = random_model()
    apply = jax.jit(model.apply) if jitted else model.apply
    with pytest.raises(ValueError, match="attention_mask"):
        apply({"params": params}, IDS, jnp.ones(shape, int))


def test_ids_must_have_a_batch_axis():
    model, params = random_model()
    with pytest.raises(ValueError, match=r"\[batch, length\]"):
        model.apply({"params": params}, IDS[0])


@each_form
def test_jit_and_vmap_compute_the_same(scan: bool, x64: None):
    model, params = jax_model(random_checkpoint(SMALL, np.float64), scan=scan)
    expected = model.apply({"params": params}, IDS)
    jitted = jax.jit(model.apply)({"params": params}, IDS)
    mapped = jax.jit(jax.vmap(lambda row: model.apply({"params": params}, row[None])[0]))(IDS)
    for answer in (jitted, mapped):
        np.testing.assert_allclose(answer, expected, rtol=0, atol=1e-12)  # float64, logits of order 1


def test_ids_closed_over_by_a_trace_are_checked_and_not_traced() -> None:
    """`jit(lambda key: model.init(key, ids))` is how training starts."""
    model, ids = GPT2(TINY), jnp.array(random_ids(TINY))
    shapes = jax.eval_shape(lambda key: model.init(key, ids), jax.random.key(0))
    params = jax.jit(lambda key: model.init(key, ids))(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    assert jax.jit(lambda p: model.apply(p, ids))(params).shape == (2, 17, TINY.vocab_size)
    outside = ids + TINY.vocab_size
    with pytest.raises(IndexError, match="vocabulary is 0 to 256"):
        jax.jit(lambda p: model.apply(p, outside))(params)


def test_positions_count_every_nonzero_mask_value_as_a_token() -> None:
    mask = jnp.array([[0, 2, 2, 0, 2]])
    assert positions(mask, mask).tolist() == [[0, 0, 1, 1, 2]]


def test_ids_must_be_integers() -> None:
    with pytest.raises(ValueError, match="integers"):
        GPT2(TINY).init(jax.random.key(0), jnp.ones((1, 3)))

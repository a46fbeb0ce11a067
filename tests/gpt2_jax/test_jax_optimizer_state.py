"""AdamW's moments to and from an optax state, wherever they are in the state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.models import TINY, random_state

import bridge
import gpt2_jax
from bridge import ConversionError
from bridge.optimizer_state import AdamWState
from bridge.storage.tensors import aligned_empty
from gpt2_jax.training.config import OptimizerConfig
from gpt2_jax.training.optimizer import decay_mask, make_optimizer
from gpt2_jax.training.optimizer_state import adamw_state, with_adamw_state

CONFIG = replace(TINY, n_layer=3)

Model = gpt2_jax.GPT2


def model_and_params(**options: Any) -> tuple[Model, Any]:
    model = Model(CONFIG, **options)
    tree = bridge.to_flax(random_state(CONFIG), CONFIG, stacked=model.scan, vocab_multiple=model.vocab_multiple)
    return model, jax.tree.map(jnp.array, tree)


def random_adamw(dtype: type = np.float32) -> AdamWState:
    return AdamWState(17, random_state(CONFIG, dtype, seed=1), random_state(CONFIG, dtype, seed=2))


def counts(opt_state: Any) -> list[int]:
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    return [int(leaf) for path, leaf in leaves if jax.tree_util.keystr(path).endswith(".count")]


TRANSFORMATIONS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "ours": lambda: make_optimizer(OptimizerConfig(), max_steps=50),
    "constant-rate": lambda: optax.adamw(1e-3),
    "chained": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3))),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
    "masked-decay": lambda: optax.adamw(1e-3, mask=decay_mask),
    "masked-whole": lambda: optax.masked(optax.adam(1e-3), mask=True),
    "multi-steps": lambda: optax.MultiSteps(optax.adamw(1e-3), 2).gradient_transformation(),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("options", [{}, {"scan": True, "vocab_multiple": 64}], ids=["looped", "scanned-padded"])
def test_moments_survive_a_round_trip_and_every_count_is_set(name: str, options: dict[str, Any]) -> None:
    model, params = model_and_params(**options)
    empty = TRANSFORMATIONS[name]().init(params)
    assert adamw_state(empty, model).step == 0
    adamw = random_adamw()
    filled = with_adamw_state(empty, adamw, model)
    assert jax.tree.structure(filled) == jax.tree.structure(empty)
    assert jax.tree.map(jnp.shape, filled) == jax.tree.map(jnp.shape, empty)
    assert set(counts(filled)) == {17}
    out = adamw_state(filled, model)
    assert out.step == 17
    for moments, given in ((out.exp_avg, adamw.exp_avg), (out.exp_avg_sq, adamw.exp_avg_sq)):
        assert set(moments) == set(given)
        for parameter, array in given.items():
            np.testing.assert_array_equal(moments[parameter], array)


def test_a_filled_state_keeps_its_dtypes_and_devices() -> None:
    model, params = model_and_params()
    filled = with_adamw_state(optax.adamw(1e-3, mu_dtype=jnp.bfloat16).init(params), random_adamw(np.float64), model)
    assert {leaf.dtype for leaf in jax.tree.leaves(filled[0].mu)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(filled[0].nu)} == {jnp.dtype(jnp.float32)}
    assert filled[0].count.dtype == jnp.int32


@pytest.mark.parametrize("scan", [False, True])
def test_a_filled_state_does_not_share_memory_with_its_source(scan: bool) -> None:
    """torch's optimizer updates its moments in place."""
    model, params = model_and_params(scan=scan)
    adamw, kept = random_adamw(), random_adamw()
    lent = {name: aligned_empty(array.shape, array.dtype) for name, array in adamw.exp_avg.items()}
    for name, array in adamw.exp_avg.items():
        lent[name][:] = array
    filled = with_adamw_state(optax.adamw(1e-3).init(params), replace(adamw, exp_avg=lent), model)
    for array in lent.values():
        array[:] = np.nan
    for name, array in adamw_state(filled, model).exp_avg.items():
        np.testing.assert_array_equal(array, kept.exp_avg[name])


def test_a_state_without_one_adamw_over_everything_is_refused() -> None:
    model, params = model_and_params()
    two = optax.chain(optax.scale_by_adam(), optax.scale_by_adam())
    muon = make_optimizer(OptimizerConfig(optimizer="muon"), max_steps=50)
    for tx, message in (
        (optax.sgd(1e-3), "holds 0 AdamW states"),
        (two, "holds 2 AdamW states"),
        (muon, r"does not update 12 of the parameters, among them h_0/attn/c_attn/kernel"),
    ):
        with pytest.raises(ConversionError, match=message):
            adamw_state(tx.init(params), model)
        with pytest.raises(ConversionError, match=message):
            with_adamw_state(tx.init(params), random_adamw(), model)


def test_the_moments_of_another_model_are_refused() -> None:
    model, params = model_and_params()
    other = replace(CONFIG, n_inner=101)
    of_other = AdamWState(1, random_state(other), random_state(other))
    with pytest.raises(ConversionError, match=r"h\.0\.mlp\.c_fc\.weight has shape \(48, 101\)"):
        with_adamw_state(optax.adamw(1e-3).init(params), of_other, model)
    for options in ({"scan": True}, {"vocab_multiple": 64}):
        with pytest.raises(ConversionError, match="not made for this model's parameters"):
            with_adamw_state(optax.adamw(1e-3).init(params), random_adamw(), Model(CONFIG, **options))

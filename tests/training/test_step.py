"""The training step: pure, compiled once, exact with microbatches, and equal for every form of the model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.models import random_state

import bridge
from bridge import IGNORE_INDEX, GPT2Config
from gpt2_jax.model import GPT2
from gpt2_jax.training import OptimizerConfig, TrainState, init_state, make_eval_step, make_optimizer, make_train_step
from gpt2_jax.training.state import all_finite

pytestmark = pytest.mark.usefixtures("quick_compilation")

FLOAT32 = 1e-5
"""Sums of a few hundred float32 terms in another order, relative to the largest."""
BFLOAT16 = 3e-2
"""Eight bits of mantissa, accumulated over the depth of the model."""

CONFIG = GPT2Config(vocab_size=31, n_positions=12, n_embd=12, n_layer=2, n_head=2, n_inner=20)
MOMENTUM = optax.sgd(0.1, momentum=0.9)
"""Its updates are proportional to gradients, so that states can be compared. AdamW and Muon have their own tests."""
STEPS, BATCH, LENGTH = 4, 6, 10
PADDING = {"input_ids": 5, "labels": IGNORE_INDEX, "attention_mask": 0}


@cache
def stepper(tx: Any = MOMENTUM, *, drop: float = 0.0, seed: int = 0, ema: float | None = None, **options: Any) -> Any:
    """A compiled step, shared by all tests with the same options."""
    of_step = {name: options.pop(name) for name in ("num_microbatches", "skip_non_finite") if name in options}
    model = GPT2(replace(CONFIG, embd_pdrop=drop), **{"scan": True, **options})
    return make_train_step(model, tx, seed=seed, ema_decay=ema, **of_step)


def first_state(tx: Any = MOMENTUM, *, scan: bool = True, ema: bool = False) -> TrainState:
    tree = bridge.to_flax(random_state(CONFIG), CONFIG, stacked=scan)
    return init_state(jax.tree.map(jnp.array, tree), tx, ema)


def batch(seed: int = 0, *, ragged: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CONFIG.vocab_size, (BATCH, LENGTH + 1)).astype(np.int32)
    labels = tokens[:, 1:].copy()
    if ragged:  # rows with no labels up to all labels
        labels[np.arange(LENGTH) >= np.linspace(0, LENGTH, BATCH).astype(int)[:, None]] = IGNORE_INDEX
    return {"input_ids": tokens[:, :-1].copy(), "labels": labels}


def copied(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=FLOAT32 * np.abs(y).max()), a, b)


def some_steps(step: Any, state: TrainState, **options: Any) -> tuple[list[float], TrainState]:
    losses = []
    for seed in range(STEPS):
        state, metrics = step(state, batch(seed, **options))
        losses.append(float(metrics["loss"]))
    return losses, state


def test_a_step_is_pure_donates_its_state_and_is_compiled_once() -> None:
    step = stepper.__wrapped__()  # not the shared one, which is compiled again for the batches of other tests
    given = first_state()
    after, metrics = step(given, batch())
    assert_equal((after, metrics), step(first_state(), batch()))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    assert int(after.step) == 1
    assert not np.array_equal(after.params["wte"]["embedding"], first_state().params["wte"]["embedding"])
    some_steps(step, after)
    assert step._cache_size() == 1


def test_the_loss_falls_and_is_that_of_the_weights_before_the_update() -> None:
    state = first_state()
    summed, count = make_eval_step(GPT2(CONFIG, scan=True))(state.params, batch())
    assert int(count) == BATCH * LENGTH
    losses = []
    for _ in range(STEPS):
        state, metrics = stepper()(state, batch())
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[0], float(summed) / int(count), rtol=FLOAT32)
    assert losses == sorted(losses, reverse=True)


def test_microbatches_are_exact_with_unequal_numbers_of_labels() -> None:
    """A mean of the microbatches' means would give a microbatch with one label the same weight as a full one."""
    whole = stepper()(first_state(), batch(ragged=True))
    parts = stepper(num_microbatches=3)(first_state(), batch(ragged=True))
    assert_close(parts, whole)


def test_without_labels_the_gradient_is_zero_and_nothing_is_nan() -> None:
    nothing = batch() | {"labels": np.full((BATCH, LENGTH), IGNORE_INDEX, np.int32)}
    for step in (stepper(), stepper(num_microbatches=3)):
        state, metrics = step(first_state(), nothing)
        assert (float(metrics["loss"]), float(metrics["grad_norm"])) == (0.0, 0.0)
        assert_equal(state.params, first_state().params)


@pytest.mark.parametrize("shift", [0, 2], ids=["right", "left"])
def test_padding_on_either_side_changes_nothing(shift: int) -> None:
    """The ids of padding have no effect: the mask hides them and the labels ignore them."""
    plain = batch()
    padded = {name: np.full((BATCH, CONFIG.n_positions), fill, np.int32) for name, fill in PADDING.items()}
    for name, array in (*plain.items(), ("attention_mask", np.ones_like(plain["labels"]))):
        padded[name][:, shift : shift + LENGTH] = array
    assert_close(stepper()(first_state(), padded), stepper()(first_state(), plain))


def test_dropout_depends_on_seed_and_step_only() -> None:
    def loss(seed: int, at: int) -> float:
        state = first_state(ema=True)._replace(step=jnp.int32(at))
        return float(stepper(drop=0.3, ema=0.9, seed=seed)(state, batch())[1]["loss"])

    losses = {(seed, at): loss(seed, at) for seed, at in ((0, 0), (0, 1), (0, 2), (1, 0))}
    assert len(set(losses.values())) == 4
    assert loss(0, 1) == losses[0, 1]


def test_the_moving_average_equals_its_formula() -> None:
    state = first_state(ema=True)
    expected = copied(state.params)
    assert_equal(state.ema_params, expected)
    for t, seed in enumerate(range(3), start=1):
        state, _ = stepper(drop=0.3, ema=0.9)(state, batch(seed))
        d = (1 + t) / (10 + t)
        expected = jax.tree.map(lambda mean, new, d=d: d * mean + (1 - d) * np.asarray(new), expected, state.params)
    assert_close(state.ema_params, expected)
    assert not np.array_equal(state.ema_params["wpe"]["embedding"], state.params["wpe"]["embedding"])


def test_after_the_warm_up_the_moving_average_has_the_configured_decay() -> None:
    """A decay of 0.9 is reached at t = 80. Skipped steps are not counted."""
    for step, skipped, decay in ((79, 0, 0.9), (1000, 0, 0.9), (1000, 999, 3 / 12)):
        state = first_state(ema=True)._replace(step=jnp.int32(step), skipped=jnp.int32(skipped))
        before = copied(state.ema_params)
        after, _ = stepper(drop=0.3, ema=0.9)(state, batch())
        expected = jax.tree.map(lambda old, new: decay * old + (1 - decay) * np.asarray(new), before, after.params)  # noqa: B023
        assert_close(after.ema_params, expected)


def test_the_moving_average_of_a_short_run_predicts_as_well_as_the_last_weights() -> None:
    state, evaluated = first_state(ema=True), make_eval_step(GPT2(CONFIG, scan=True))
    initial = float(evaluated(state.params, batch())[0])
    step = stepper(ema=0.999)
    for _ in range(100):
        state, _ = step(state, batch())
    raw, mean = (float(evaluated(params, batch())[0]) for params in (state.params, state.ema_params))
    assert raw < 0.2 * initial
    assert mean < raw + 0.05 * initial


def test_bfloat16_computes_and_float32_is_stored() -> None:
    tx = make_optimizer(OptimizerConfig(), STEPS)
    state, metrics = stepper(tx, dtype=jnp.bfloat16)(first_state(tx), batch())
    floats = [leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert set(map(str, floats)) == {"float32"}
    in_float32 = stepper()(first_state(), batch())[1]
    np.testing.assert_allclose(float(metrics["loss"]), float(in_float32["loss"]), rtol=BFLOAT16)
    assert float(metrics["loss"]) != float(in_float32["loss"])


@pytest.mark.parametrize("form", [{"remat": "dots"}, {"remat": "full"}, {"scan": False}], ids=["dots", "full", "loop"])
def test_the_forms_of_the_model_train_alike(form: dict[str, Any]) -> None:
    expected, reference = some_steps(stepper(), first_state(), ragged=True)
    losses, state = some_steps(stepper(**form), first_state(scan=form.get("scan", True)), ragged=True)
    np.testing.assert_allclose(losses, expected, rtol=FLOAT32)
    assert_close(*(bridge.to_torch(copied(s.params), CONFIG) for s in (state, reference)))


def test_remat_is_in_the_program() -> None:
    state = jax.eval_shape(first_state)
    programs = [str(stepper(remat=remat).trace(state, batch()).jaxpr) for remat in ("none", "dots", "full")]
    assert ["remat" in program for program in programs] == [False, True, True]


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_single_non_finite_number_is_found(poison: float) -> None:
    params = first_state().params
    assert all_finite(params)
    bias = params["h"]["attn"]["c_attn"]["bias"]
    params["h"]["attn"]["c_attn"]["bias"] = bias.at[1, 2, 0, 3].set(poison)
    assert not all_finite(params)


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_a_non_finite_step_is_skipped_and_counted(num_microbatches: int) -> None:
    """Weights, optimizer state and moving average equal those of a run without the skipped batch."""
    tx = make_optimizer(OptimizerConfig(warmup_steps=1), 9)
    step = stepper(tx, num_microbatches=num_microbatches, ema=0.5, skip_non_finite=True)
    bad = batch(1)
    bad["input_ids"][0, 0] = CONFIG.vocab_size  # which makes its row NaN
    state, expected = first_state(tx, ema=True), first_state(tx, ema=True)
    metrics = []
    for given in (batch(0), bad, bad, batch(2)):
        state, measured = step(state, given)
        metrics.append({name: float(value) for name, value in measured.items()})
    for given in (batch(0), batch(2)):
        expected, last = step(expected, given)
    assert [m["skipped"] for m in metrics] == [0, 1, 2, 2]
    assert [np.isfinite(m["loss"]) for m in metrics] == [True, False, False, True]
    assert metrics[-1]["loss"] == float(last["loss"])
    assert (int(state.step), int(state.skipped), int(expected.step)) == (4, 2, 2)
    assert_equal(state._replace(step=0, skipped=0), expected._replace(step=0, skipped=0))


def test_by_default_no_step_is_skipped() -> None:
    bad = batch(1)
    bad["input_ids"][0, 0] = CONFIG.vocab_size
    state, metrics = stepper()(first_state(), bad)
    assert (int(metrics["skipped"]), bool(all_finite(state.params))) == (0, False)

"""The optimizer against its formulas in numpy: schedules, weight decay, clipping, AdamW and Muon."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax
import pytest
from support.models import random_state

import bridge
from bridge import GPT2Config
from gpt2_jax.training import OptimizerConfig, learning_rate_schedule, make_optimizer
from gpt2_jax.training.optimizer import clip_factor, decay_mask

pytestmark = pytest.mark.usefixtures("quick_compilation")

FLOAT32 = 2e-6
"""A few float32 roundings, relative to the largest value."""
NEWTON_SCHULZ = 2e-3
"""Five iterations of a quintic polynomial: each multiplies rounding errors by up to 3.4445."""

SIZES = GPT2Config(vocab_size=29, n_positions=11, n_embd=18, n_layer=3, n_head=3, n_inner=30)
MODELS = {
    "biases": SIZES,
    "no biases": replace(SIZES, bias=False),
    "untied": replace(SIZES, tie_word_embeddings=False),
}
EITHER_FORM = pytest.mark.parametrize("stacked", [False, True], ids=["looped", "stacked"])


def nanogpt(it: int, lr: float, min_lr: float, warmup_iters: int, lr_decay_iters: int) -> float:
    """The schedule of nanoGPT's train.py (`get_lr`)."""
    if it < warmup_iters:
        return lr * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    part = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * part)) * (lr - min_lr)


def assert_schedule(config: OptimizerConfig, steps: int, expected: Any) -> None:
    schedule = jax.jit(learning_rate_schedule(config, steps))
    found = [float(schedule(step)) for step in range(steps + 5)]
    np.testing.assert_allclose(found, [expected(step) for step in range(steps + 5)], rtol=0, atol=FLOAT32 * 6e-4)


@pytest.mark.parametrize(
    ("warmup", "decay_steps", "floor"),
    [(7, 33, 6e-5), (7, None, 6e-5), (0, 20, 0.0), (1, None, 1e-3), (20, None, 6e-5)],
)
def test_the_cosine_is_nanogpts_at_every_step(warmup: int, decay_steps: int | None, floor: float) -> None:
    config = OptimizerConfig(warmup_steps=warmup, decay_steps=decay_steps, min_learning_rate=floor)
    assert_schedule(config, 41, lambda step: nanogpt(step, 6e-4, floor, warmup, decay_steps or 41))


def test_a_run_that_is_shorter_than_its_warm_up_only_warms_up() -> None:
    schedule = learning_rate_schedule(OptimizerConfig(warmup_steps=100), 10)
    found = [float(schedule(step)) for step in (0, 9)]
    np.testing.assert_allclose(found, [6e-4 / 101, 6e-4 * 10 / 101], rtol=0, atol=FLOAT32 * 6e-4)


@pytest.mark.parametrize(("warmup", "fraction"), [(6, 0.25), (0, 1.0), (35, 0.25)])
def test_wsd_warms_up_stays_constant_and_decays_linearly(warmup: int, fraction: float) -> None:
    steps, peak, floor = 40, 6e-4, 6e-5
    begins = max(warmup, round((1 - fraction) * steps))

    def expected(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        return peak + (floor - peak) * min(1.0, max(0.0, (step - begins) / (steps - begins)))

    config = OptimizerConfig(schedule="wsd", warmup_steps=warmup, decay_fraction=fraction)
    assert_schedule(config, steps, expected)


def test_constant_warms_up_and_stays_constant() -> None:
    config = OptimizerConfig(schedule="constant", warmup_steps=5)
    assert_schedule(config, 20, lambda step: 6e-4 * min(1.0, (step + 1) / 6))


def flax_arrays(config: GPT2Config, stacked: bool, seed: int = 0) -> Any:
    return bridge.to_flax(random_state(config, seed=seed), config, stacked=stacked)


@EITHER_FORM
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_decay_acts_on_projections_and_embeddings_by_name(config: GPT2Config, stacked: bool) -> None:
    params = flax_arrays(config, stacked)
    marks = jax.tree.map(lambda marked, array: np.full(array.shape, marked), decay_mask(params), params)
    # The conversion accepts only floats.
    names = bridge.to_torch(jax.tree.map(lambda m: m.astype(np.float32), marks), config)
    decayed = {name for name, mark in names.items() if mark.all()}
    assert all(mark.all() or not mark.any() for mark in names.values())
    assert decayed == {p.torch_name for p in bridge.parameters(config) if p.decays}
    # As in nanoGPT, in PyTorch's layout: matrices decay, vectors do not.
    assert decayed == {p.torch_name for p in bridge.parameters(config) if len(p.torch_shape) == 2}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_parameter_of_an_unknown_name_is_an_error(optimizer: Any) -> None:
    with pytest.raises(KeyError, match="gamma"):
        make_optimizer(OptimizerConfig(optimizer=optimizer), 10).init({"ln_f": {"gamma": np.ones(3, np.float32)}})


def first_update(config: GPT2Config, settings: OptimizerConfig, stacked: bool) -> dict[str, np.ndarray]:
    """The first update of each parameter, for random gradients of seed 1."""
    params, grads = flax_arrays(config, stacked), flax_arrays(config, stacked, seed=1)
    tx = make_optimizer(settings, 10)
    updates = jax.jit(lambda params, grads: tx.update(grads, tx.init(params), params)[0])(params, grads)
    return bridge.to_torch(jax.tree.map(np.asarray, updates), config)


def adamw_first(name: str, config: GPT2Config, settings: OptimizerConfig, rate: float) -> np.ndarray:
    """Loshchilov and Hutter 2019, algorithm 2: after one step, the bias-corrected moments are g and g * g."""
    weight, g = random_state(config)[name], random_state(config, seed=1)[name]
    decays = next(p.decays for p in bridge.parameters(config) if p.torch_name == name)
    return -rate * (g / (np.abs(g) + settings.epsilon) + decays * settings.weight_decay * weight)


def orthogonalized(gradient: np.ndarray) -> np.ndarray:
    """The quintic Newton-Schulz iteration of github.com/KellerJordan/Muon, in float64."""
    x = gradient.astype(np.float64) / np.linalg.norm(gradient)
    transposed = x.shape[0] > x.shape[1]
    x = x.T if transposed else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if transposed else x


@EITHER_FORM
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_adamw_equals_its_formula_for_every_parameter(config: GPT2Config, stacked: bool) -> None:
    settings = OptimizerConfig(warmup_steps=3, weight_decay=0.3)
    for name, update in first_update(config, settings, stacked).items():
        expected = adamw_first(name, config, settings, rate=6e-4 / 4)
        np.testing.assert_allclose(update, expected, rtol=0, atol=FLOAT32 * np.abs(expected).max(), err_msg=name)


@EITHER_FORM
def test_muon_takes_every_projection_of_the_layers_and_adamw_the_rest(stacked: bool) -> None:
    config = MODELS["untied"]
    settings = OptimizerConfig(optimizer="muon", warmup_steps=3, weight_decay=0.3, muon_weight_decay=0.2)
    taken = 0
    for name, update in first_update(config, settings, stacked).items():
        if not name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            expected = adamw_first(name, config, settings, rate=6e-4 / 4)
            np.testing.assert_allclose(update, expected, rtol=0, atol=FLOAT32 * np.abs(expected).max(), err_msg=name)
            continue
        taken += 1
        weight, gradient = random_state(config)[name], random_state(config, seed=1)[name]
        parts = 3 if "c_attn" in name else 1  # query, key and value are three matrices
        for w, g, u in zip(*(np.split(x, parts, axis=1) for x in (weight, gradient, update)), strict=True):
            inputs, outputs = g.shape
            direction = -(u / (settings.muon_learning_rate / 4) + 0.2 * w)
            direction /= math.sqrt(max(1.0, outputs / inputs))
            np.testing.assert_allclose(direction, orthogonalized(g), rtol=0, atol=NEWTON_SCHULZ, err_msg=name)
            singular = np.linalg.svd(direction, compute_uv=False)
            assert 0.3 < singular.min() <= singular.max() < 1.3, name  # the iteration's own accuracy
    assert taken == 4 * config.n_layer


def test_query_key_and_value_do_not_depend_on_each_others_gradients() -> None:
    params, grads = flax_arrays(SIZES, stacked=True), flax_arrays(SIZES, stacked=True, seed=1)
    tx = make_optimizer(OptimizerConfig(optimizer="muon"), 10)
    update = jax.jit(lambda grads: tx.update(grads, tx.init(params), params)[0]["h"]["attn"]["c_attn"]["kernel"])
    before = np.asarray(update(grads))
    larger = jax.tree.map(np.array, grads)
    larger["h"]["attn"]["c_attn"]["kernel"][1, :, 0] *= -100.0  # the queries of layer 1
    after = np.asarray(update(larger))
    same = np.isclose(before, after, rtol=0, atol=FLOAT32 * np.abs(before).max())
    same_by_matrix = same.all(axis=(1, 3, 4))
    assert not same_by_matrix[1, 0]
    assert same_by_matrix.sum() == 3 * SIZES.n_layer - 1


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("largest", [1.0, 1e-3, None])
def test_clipping_equals_torchs(scale: float, largest: float | None) -> None:
    import torch

    arrays = {name: scale * array for name, array in random_state(replace(SIZES, n_layer=1)).items()}
    norm = optax.tree.norm(arrays)
    factor = jax.jit(clip_factor, static_argnums=1)(norm, largest)
    clipped = jax.tree.map(lambda array: array * factor, arrays)
    given = {name: torch.nn.Parameter(torch.zeros(array.shape)) for name, array in arrays.items()}
    for name, array in arrays.items():
        given[name].grad = torch.from_numpy(array.copy())
    expected = torch.nn.utils.clip_grad_norm_(given.values(), math.inf if largest is None else largest)
    np.testing.assert_allclose(norm, expected.numpy(), rtol=FLOAT32)
    for name, parameter in given.items():
        np.testing.assert_allclose(clipped[name], parameter.grad.numpy(), rtol=FLOAT32, err_msg=name)


def test_the_optimizer_has_the_state_that_the_bridge_reads() -> None:
    """`optimizer_state.py` reads AdamW's moments from it."""
    state = make_optimizer(OptimizerConfig(), 10).init(flax_arrays(SIZES, stacked=True))
    found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
    assert sum(isinstance(leaf, optax.ScaleByAdamState) for leaf in found) == 1

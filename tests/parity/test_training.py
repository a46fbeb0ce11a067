"""Both backends train alike on the same batches, and a run may change its backend halfway.

The last tests introduce one mistake at a time, which the checks of the other tests must detect.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from support.implementations import relative_l2
from support.models import TINY, random_state

import bridge
import gpt2_jax
import gpt2_torch
from bridge import IGNORE_INDEX, Checkpoint, GPT2Config
from bridge.optimizer_state import AdamWState
from gpt2_jax.training import init_state, make_train_step
from gpt2_jax.training import optimizer_state as jax_optimizer_state
from gpt2_jax.training.config import OptimizerConfig
from gpt2_jax.training.optimizer import learning_rate_schedule, make_optimizer
from gpt2_torch import training as torch_train

STEPS, CROSSING, AFTER_CROSSING = 50, 20, 40
BATCH, LENGTH, MICROBATCHES = 10, 13, 2
CONFIG = replace(TINY, vocab_size=67, n_positions=17, n_embd=24, n_layer=3, n_head=2, n_inner=40)

OPTIMIZER = OptimizerConfig(
    learning_rate=3e-3, min_learning_rate=3e-4, warmup_steps=7, decay_steps=45, weight_decay=0.1, max_grad_norm=1.2
)
"""The steps include warm-up, cosine and the constant end. The norm exceeds `max_grad_norm` in some of them."""

LOSS = {"float64": 1e-9, "float32": 1e-4}
"""Nats, in every step. Two correct programs differ by about 1e-15 and 1e-6. In float64, a constant that is rounded to
float32 causes a difference of 1e-8."""

UPDATE = {"float64": 1e-9, "float32": 1e-4}
"""Relative L2 distance of the change of each parameter. Two correct programs differ by about 1e-14 and 1e-5, because
weights near 1 are rounded by 1e-7 at each of 50 steps of about 1e-3."""

RATE_FP64 = 1e-12
"""Relative error of a dozen operations on numbers of similar size."""


@dataclass(frozen=True)
class Form:
    """A configuration, and the form of its layers and vocabulary in the port."""

    scan: bool
    vocab_multiple: int
    config: GPT2Config


FORMS = {
    "scanned": Form(scan=True, vocab_multiple=8, config=CONFIG),
    "looped": Form(scan=False, vocab_multiple=1, config=replace(CONFIG, tie_word_embeddings=False)),
}


@dataclass(frozen=True)
class Snapshot:
    """The state between two steps that the bridge converts."""

    weights: Mapping[str, np.ndarray]
    adamw: AdamWState


@dataclass(frozen=True)
class Run:
    losses: list[float]
    norms: list[float]
    snapshots: dict[int, Snapshot]
    """Number of completed steps -> snapshot."""


@functools.cache
def batches() -> list[dict[str, np.ndarray]]:
    """Return batches of numbers that increase by a stride, which is easy to learn.

    Half of the batches have padding on the right or left, a row of padding only, and ignored labels, so that the two
    microbatches have different numbers of labels.
    """
    rng = np.random.default_rng(1)
    result = []
    for step in range(STEPS):
        start, stride = rng.integers(0, CONFIG.vocab_size, (BATCH, 1)), rng.integers(1, 4, (BATCH, 1))
        tokens = ((start + stride * np.arange(LENGTH + 1)) % CONFIG.vocab_size).astype(np.int32)
        labels, mask = tokens[:, 1:].copy(), np.ones((BATCH, LENGTH), np.int32)
        if step % 2:
            mask = (np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (BATCH, 1))).astype(np.int32)
            mask[step % BATCH] = 0
            mask = mask[:, ::-1] if step % 4 == 3 else mask
            labels[(mask == 0) | (rng.random(mask.shape) < 0.2)] = IGNORE_INDEX
        result.append({"input_ids": tokens[:, :-1].copy(), "labels": labels, "attention_mask": mask.copy()})
    return result


def beginning(form: str, dtype: str) -> Snapshot:
    weights = random_state(FORMS[form].config, np.dtype(dtype))
    zeros = {name: np.zeros_like(array) for name, array in weights.items()}
    return Snapshot(weights, AdamWState(0, zeros, zeros))


def snapshot(weights: Mapping[str, np.ndarray], adamw: AdamWState) -> Snapshot:
    """Copy the arrays, because torch continues in the same memory."""
    weights, first, second = (
        {name: np.array(array) for name, array in arrays.items()}
        for arrays in (weights, adamw.exp_avg, adamw.exp_avg_sq)
    )
    return Snapshot(weights, AdamWState(adamw.step, first, second))


def torch_rate(step: int, o: OptimizerConfig = OPTIMIZER) -> float:
    return torch_train.learning_rate_at(
        step,
        max_steps=STEPS,
        learning_rate=o.learning_rate,
        min_learning_rate=o.min_learning_rate,
        schedule=o.schedule,
        warmup_steps=o.warmup_steps,
        decay_steps=o.decay_steps,
        decay_fraction=o.decay_fraction,
    )


def torch_run(form: str, start: Snapshot, end: int = STEPS) -> Run:
    o, config = OPTIMIZER, FORMS[form].config
    model = gpt2_torch.model_from_checkpoint(Checkpoint.of(start.weights, config))
    optimizer = torch_train.adamw(model, beta1=o.beta1, beta2=o.beta2, epsilon=o.epsilon, weight_decay=o.weight_decay)
    torch_train.load_adamw_state(optimizer, start.adamw, model)
    run = Run([], [], {})
    for step in range(start.adamw.step, end):
        batch = {name: torch.from_numpy(array) for name, array in batches()[step].items()}
        loss, norm = torch_train.train_step(
            model,
            optimizer,
            batch,
            learning_rate=torch_rate(step),
            max_grad_norm=o.max_grad_norm,
            num_microbatches=MICROBATCHES,
        )
        run.losses.append(loss.item())
        run.norms.append(norm.item())
        if step + 1 in (CROSSING, AFTER_CROSSING, STEPS):
            weights = gpt2_torch.checkpoint_from_model(model).tensors
            run.snapshots[step + 1] = snapshot(weights, torch_train.adamw_state(optimizer, model))
    return run


@functools.cache
def jax_sides(form: str, dtype: str) -> tuple[gpt2_jax.GPT2, Any, Callable[..., Any]]:
    f = FORMS[form]
    model = gpt2_jax.GPT2(f.config, jnp.dtype(dtype), jnp.dtype(dtype), f.scan, f.vocab_multiple)
    tx = make_optimizer(OPTIMIZER, STEPS)
    return model, tx, make_train_step(model, tx, num_microbatches=MICROBATCHES, max_grad_norm=OPTIMIZER.max_grad_norm)


def jax_run(form: str, start: Snapshot, end: int = STEPS) -> Run:
    dtype = start.weights["wte.weight"].dtype.name
    with jax.enable_x64(dtype == "float64"):
        model, tx, train_step = jax_sides(form, dtype)
        tree = bridge.to_flax(start.weights, model.config, stacked=model.scan, vocab_multiple=model.vocab_multiple)
        state = init_state(jax.tree.map(jnp.array, tree), tx)
        opt_state = jax_optimizer_state.with_adamw_state(state.opt_state, start.adamw, model)
        state = state._replace(step=jnp.int32(start.adamw.step), opt_state=opt_state)
        run = Run([], [], {})
        for step in range(start.adamw.step, end):
            state, metrics = train_step(state, batches()[step])
            run.losses.append(float(metrics["loss"]))
            run.norms.append(float(metrics["grad_norm"]))
            if step + 1 in (CROSSING, AFTER_CROSSING, STEPS):
                weights = bridge.to_torch(state.params, model.config, vocab_multiple=model.vocab_multiple)
                run.snapshots[step + 1] = snapshot(weights, jax_optimizer_state.adamw_state(state.opt_state, model))
    return run


@functools.cache
def full_run(run: Callable[[str, Snapshot], Run], form: str, dtype: str) -> Run:
    """Train all steps in one backend."""
    return run(form, beginning(form, dtype))


def check_losses(run: Run, other: Run, dtype: str, first: int = 0) -> None:
    """Assert that `run`, which started at step `first`, has the losses of `other`."""
    np.testing.assert_allclose(run.losses, other.losses[first:][: len(run.losses)], atol=LOSS[dtype], rtol=0)


def check_weights(run: Run, other: Run, form: str, dtype: str, after: int) -> None:
    """Assert that both runs changed each weight alike, and have the same step count."""
    a, b = run.snapshots[after], other.snapshots[after]
    assert a.adamw.step == b.adamw.step == after
    begun = beginning(form, dtype).weights
    distances = {name: relative_l2(*(_moving(name, s.weights[name] - begun[name]) for s in (a, b))) for name in begun}
    assert max(distances.values()) < UPDATE[dtype], {n: d for n, d in distances.items() if d >= UPDATE[dtype]}


def _moving(name: str, array: np.ndarray) -> np.ndarray:
    """Remove the key bias. Softmax cancels it, so its gradient is only rounding, which Adam amplifies."""
    if not name.endswith("c_attn.bias"):
        return array
    query, _, value = np.split(array, 3)
    return np.concatenate([query, value])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread. Small matrices need no more, and torch's threads spin if other processes use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


each_form_and_dtype = pytest.mark.parametrize(
    ("form", "dtype"), [(form, dtype) for form in FORMS for dtype in ("float64", "float32")]
)


@pytest.mark.sampled(3)
@each_form_and_dtype
def test_the_backends_train_alike(form: str, dtype: str) -> None:
    ours, reference = full_run(jax_run, form, dtype), full_run(torch_run, form, dtype)
    check_losses(ours, reference, dtype)
    np.testing.assert_allclose(ours.norms, reference.norms, rtol=LOSS[dtype])
    check_weights(ours, reference, form, dtype, STEPS)
    assert np.mean(ours.losses[-5:]) < np.mean(ours.losses[:5]) - 0.5


@each_form_and_dtype
def test_clipping_acts_in_some_steps_and_not_in_others(form: str, dtype: str) -> None:
    clipped = np.array(full_run(torch_run, form, dtype).norms) > OPTIMIZER.max_grad_norm
    assert 10 < clipped.sum() < STEPS - 10


@pytest.mark.sampled(3)
@each_form_and_dtype
def test_twenty_steps_in_torch_and_twenty_in_jax_equal_forty_in_either(form: str, dtype: str) -> None:
    crossed = jax_run(form, full_run(torch_run, form, dtype).snapshots[CROSSING], AFTER_CROSSING)
    for backend in (torch_run, jax_run):
        check_losses(crossed, full_run(backend, form, dtype), dtype, CROSSING)
        check_weights(crossed, full_run(backend, form, dtype), form, dtype, AFTER_CROSSING)


@each_form_and_dtype
def test_twenty_steps_in_jax_and_twenty_in_torch_equal_forty_in_either(form: str, dtype: str) -> None:
    crossed = torch_run(form, full_run(jax_run, form, dtype).snapshots[CROSSING], AFTER_CROSSING)
    for backend in (torch_run, jax_run):
        check_losses(crossed, full_run(backend, form, dtype), dtype, CROSSING)
        check_weights(crossed, full_run(backend, form, dtype), form, dtype, AFTER_CROSSING)


SCHEDULES = [
    replace(OPTIMIZER, schedule=schedule, warmup_steps=warmup, decay_steps=decay, decay_fraction=fraction)
    for schedule in ("cosine", "wsd", "constant")
    for warmup in (0, 1, 7)
    for decay, fraction in ((None, 0.2), (45, 0.5), (STEPS + 10, 1.0))
]


@pytest.mark.parametrize("optimizer", SCHEDULES, ids=lambda o: f"{o.schedule}-{o.warmup_steps}-{o.decay_steps}")
def test_the_learning_rates_of_all_steps_are_equal(optimizer: OptimizerConfig, x64: None) -> None:
    check_schedule(lambda step: torch_rate(step, optimizer), optimizer)


def check_schedule(rate: Callable[[int], float], optimizer: OptimizerConfig) -> None:
    steps = np.arange(STEPS + 20, dtype=np.int32)
    ours = jax.jit(learning_rate_schedule(optimizer, STEPS))(steps)
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, [rate(int(step)) for step in steps], rtol=RATE_FP64)


# Mistakes in the reference. The difference would be the same in the port, but the reference needs no compilation.

Patch = pytest.MonkeyPatch


def decay_biases(patch: Patch) -> None:
    patch.setattr(bridge.parameter_table.Parameter, "decays", True)


def begin_the_schedule_at_one(patch: Patch) -> None:
    right = torch_train.learning_rate_at
    patch.setattr(torch_train, "learning_rate_at", lambda step, **fields: right(step + 1, **fields))


def clip_without_epsilon(patch: Patch) -> None:
    def clip(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        grads = [parameter.grad for parameter in parameters]
        norm = torch.sqrt(sum((grad**2).sum() for grad in grads))
        for grad in grads:
            grad *= torch.clamp(max_norm / norm, max=1.0)
        return norm

    patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)


def average_the_microbatches(patch: Patch) -> None:
    """Make the loss of a batch the mean of its microbatches' means."""
    right_step, right_loss = torch_train.train_step, torch_train.summed_loss

    def step(model: Any, optimizer: Any, batch: Any, **kwargs: Any) -> Any:
        count = (batch["labels"] != IGNORE_INDEX).sum()

        def loss(model: Any, part: Any) -> torch.Tensor:
            return right_loss(model, part) * count / (MICROBATCHES * (part["labels"] != IGNORE_INDEX).sum())

        patch.setattr(torch_train, "summed_loss", loss)
        return right_step(model, optimizer, batch, **kwargs)

    patch.setattr(torch_train, "train_step", step)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("introduce", "shows_in"),
    [
        (decay_biases, ("float64", "float32")),
        (begin_the_schedule_at_one, ("float64", "float32")),
        (clip_without_epsilon, ("float64",)),  # changes losses by 1e-7, which is within the rounding of float32
        (average_the_microbatches, ("float64", "float32")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_mistake_in_training_is_detected(
    introduce: Callable[[Patch], None], shows_in: tuple[str, ...], monkeypatch: Patch
) -> None:
    ours = {dtype: full_run(jax_run, "scanned", dtype) for dtype in shows_in}
    introduce(monkeypatch)
    for dtype in shows_in:
        wrong = torch_run("scanned", beginning("scanned", dtype))
        with pytest.raises(AssertionError):
            check_losses(ours[dtype], wrong, dtype)
        with pytest.raises(AssertionError):
            check_weights(ours[dtype], wrong, "scanned", dtype, STEPS)


def test_a_schedule_off_by_one_is_detected(x64: None) -> None:
    with pytest.raises(AssertionError):
        check_schedule(lambda step: torch_rate(step + 1), OPTIMIZER)


def lose_the_count(state: AdamWState) -> AdamWState:
    return replace(state, step=0)


def count_one_too_many(state: AdamWState) -> AdamWState:
    return replace(state, step=state.step + 1)


def lose_the_moments(state: AdamWState) -> AdamWState:
    zeros = {name: np.zeros_like(array) for name, array in state.exp_avg.items()}
    return replace(state, exp_avg=zeros, exp_avg_sq=zeros)


def lose_one_moment(state: AdamWState) -> AdamWState:
    """Zero the first moment of one of the smallest parameters, in one layer."""
    return replace(state, exp_avg={**state.exp_avg, "h.2.ln_2.bias": np.zeros_like(state.exp_avg["h.2.ln_2.bias"])})


def swap_query_and_value(state: AdamWState) -> AdamWState:
    """Permute the moments of one kernel like a wrong conversion, with correct weights."""
    name = "h.1.attn.c_attn.weight"
    query, key, value = np.split(state.exp_avg_sq[name], 3, axis=1)
    return replace(state, exp_avg_sq={**state.exp_avg_sq, name: np.concatenate([value, key, query], axis=1)})


@pytest.mark.sampled(3)
@pytest.mark.parametrize("run", [torch_run, jax_run], ids=["into-torch", "into-jax"])
@pytest.mark.parametrize(
    "spoil", [lose_the_count, count_one_too_many, lose_the_moments, lose_one_moment, swap_query_and_value]
)
def test_a_mistake_in_the_conversion_of_the_state_is_detected(
    run: Callable[..., Run], spoil: Callable[[AdamWState], AdamWState], monkeypatch: Patch
) -> None:
    start = full_run(torch_run, "scanned", "float64").snapshots[CROSSING]
    check_losses(run("scanned", start, AFTER_CROSSING), full_run(jax_run, "scanned", "float64"), "float64", CROSSING)
    to_torch, to_jax = torch_train.load_adamw_state, jax_optimizer_state.with_adamw_state
    monkeypatch.setattr(torch_train, "load_adamw_state", lambda o, state, model: to_torch(o, spoil(state), model))
    monkeypatch.setattr(jax_optimizer_state, "with_adamw_state", lambda o, state, model: to_jax(o, spoil(state), model))
    wrong = run("scanned", start, AFTER_CROSSING)
    with pytest.raises(AssertionError):
        check_losses(wrong, full_run(jax_run, "scanned", "float64"), "float64", CROSSING)
    with pytest.raises(AssertionError):
        check_weights(wrong, full_run(jax_run, "scanned", "float64"), "scanned", "float64", AFTER_CROSSING)


def test_a_schedule_that_restarts_after_the_conversion_is_detected(monkeypatch: Patch) -> None:
    """optax has two step counts: for the bias correction and for the schedule."""
    right = jax_optimizer_state.with_adamw_state

    def wrong(opt_state: Any, state: AdamWState, model: gpt2_jax.GPT2) -> Any:
        return jax.tree.map(
            lambda new, old: new if isinstance(new, optax.ScaleByAdamState) else old,
            right(opt_state, state, model),
            opt_state,
            is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState),
        )

    start = full_run(torch_run, "scanned", "float64").snapshots[CROSSING]
    monkeypatch.setattr(jax_optimizer_state, "with_adamw_state", wrong)
    crossed = jax_run("scanned", start, AFTER_CROSSING)
    assert crossed.snapshots[AFTER_CROSSING].adamw.step == AFTER_CROSSING
    with pytest.raises(AssertionError):
        check_losses(crossed, full_run(jax_run, "scanned", "float64"), "float64", CROSSING)

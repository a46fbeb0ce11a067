"""One training step: pure, compiled, its state donated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from bridge import IGNORE_INDEX
from gpt2_jax.loss import summed_loss
from gpt2_jax.model import GPT2
from gpt2_jax.parallel.sharding import constrain_tree
from gpt2_jax.training.optimizer import clip_factor

Batch = Mapping[str, Any]
"""`input_ids` [B, T]; `labels` [B, T], the next tokens, or `IGNORE_INDEX` for positions that do not count; and with
padding, `attention_mask` [B, T], 1 for tokens and 0 for padding."""

Metrics = dict[str, Array]

TrainStep = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]
EvalStep = Callable[[Any, Batch], tuple[Float[Array, ""], Int[Array, ""]]]


class TrainState(NamedTuple):
    """Everything that a step changes. Randomness and the position in the data derive from `step`."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    ema_params: Any = None
    """The exponential moving average of the parameters, if enabled."""
    skipped: Any = None
    """The number of steps whose update was discarded because the loss or gradient was not finite."""


def init_state(params: Any, tx: optax.GradientTransformation, ema: bool = False) -> TrainState:
    """The state before the first step."""
    mean = jax.tree.map(jnp.copy, params) if ema else None  # copied: donated buffers must be distinct
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), mean, jnp.zeros((), jnp.int32))


def make_train_step(
    model: GPT2,
    tx: optax.GradientTransformation,
    *,
    seed: int = 0,
    num_microbatches: int = 1,
    max_grad_norm: float | None = 1.0,
    ema_decay: float | None = None,
    skip_non_finite: bool = False,
) -> TrainStep:
    """Return a compiled `step(state, batch) -> (state, metrics)` that donates its input state.

    Under `jax.set_mesh` it runs on that mesh, and the new state has the sharding of `gpt2_jax.parallel.sharding`.

    The loss is the mean over all counted labels of the batch: with `num_microbatches` above 1, sums are added over the
    microbatches and divided once. Metrics: `loss`, in nats; `grad_norm`, before clipping; `skipped`, the number of
    steps so far with a non-finite loss or gradient. With `skip_non_finite`, such a step changes only the two counts:
    parameters, moments and the position in the schedule stay.
    """
    drops = max(model.config.embd_pdrop, model.config.attn_pdrop, model.config.resid_pdrop) > 0.0

    def total_loss(params: Any, batch: Batch, key: Array) -> Float[Array, ""]:
        return summed_loss(model, params, batch, key if drops else None)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        total, grads = _accumulated(jax.value_and_grad(total_loss), state.params, batch, key, num_microbatches)
        grads = constrain_tree(grads)  # each device needs only the sums of its own shard
        count = jnp.maximum((batch["labels"] != IGNORE_INDEX).sum(), 1)
        # Mean and clipping are one factor, so that only the optimizer reads the gradients again.
        norm = optax.tree.norm(grads) / count
        factor = clip_factor(norm, max_grad_norm) / count
        grads = jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        mean = state.ema_params
        if ema_decay is not None:
            updates_made = state.step - state.skipped + 1
            mean = optax.incremental_update(params, mean, average_step_size(ema_decay, updates_made))
        after = TrainState(state.step + 1, params, opt_state, mean, state.skipped)
        if skip_non_finite:
            after = _unless(jnp.isfinite(total) & jnp.isfinite(norm), after, state)
        return constrain_tree(after), {"loss": total / count, "grad_norm": norm, "skipped": after.skipped}

    return jax.jit(step, donate_argnums=0)


def average_step_size(decay: float, updates: Int[Array, ""]) -> Float[Array, ""]:
    """Return the weight of the new parameters in their moving average: 1 - min(decay, (1 + t) / (10 + t)), t updates.

    The decay is warmed up, so that the initial weights do not dominate the average of a short run. Source:
    `num_updates` of TensorFlow's `tf.train.ExponentialMovingAverage`.
    """
    return jnp.maximum(1.0 - decay, 9.0 / (10.0 + updates))  # in Python floats: 1 - decay in float32 would be inexact


def _unless(finite: Bool[Array, ""], after: TrainState, before: TrainState) -> TrainState:
    """Return the updated state if the step was `finite`, otherwise the old state with the step counted as skipped."""
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
    return kept._replace(step=after.step, skipped=before.skipped + ~finite)


def _accumulated(
    value_and_grad: Callable[..., tuple[Array, Any]], params: Any, batch: Batch, key: Array, parts: int
) -> tuple[Float[Array, ""], Any]:
    """Return loss and gradients, summed over the batch in `parts` microbatches."""
    if parts == 1:
        return value_and_grad(params, batch, key)
    # Microbatch k takes rows k, k+n, k+2n, ..., so that it has equally many rows from each device.
    split = {name: rows.reshape(-1, parts, *rows.shape[1:]).swapaxes(0, 1) for name, rows in batch.items()}

    def add(sums: tuple[Array, Any], part: tuple[Batch, Array]) -> tuple[tuple[Array, Any], None]:
        total, grads = value_and_grad(params, *part)
        return jax.tree.map(jnp.add, sums, (total, constrain_tree(grads))), None

    shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda rows: rows[0], split), key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, (split, jax.random.split(key, parts)))[0]


@jax.jit
def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether all numbers in the tree are finite."""
    return jax.tree.reduce(lambda so_far, leaf: so_far & jnp.isfinite(leaf).all(), tree, jnp.array(True))


def make_eval_step(model: GPT2) -> EvalStep:
    """Return a compiled `eval_step(params, batch) -> (summed loss in nats, number of counted labels)`."""

    @jax.jit
    def eval_step(params: Any, batch: Batch) -> tuple[Array, Array]:
        return summed_loss(model, params, batch), (batch["labels"] != IGNORE_INDEX).sum()

    return eval_step

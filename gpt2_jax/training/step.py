"""The training step and the evaluation step: pure functions, compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from bridge import IGNORE_INDEX
from gpt2_jax.loss import summed_loss
from gpt2_jax.model import GPT2
from gpt2_jax.parallel.sharding import constrain_tree
from gpt2_jax.training.optimizer import clip_factor
from gpt2_jax.training.partial import model_variables
from gpt2_jax.training.state import TrainState

Batch = Mapping[str, Any]
"""`input_ids` [B, T]; `labels` [B, T], the next tokens, or `IGNORE_INDEX` for positions that do not count; and
optionally `attention_mask`, `segment_ids` and `position_ids` [B, T], as in the model's call."""

Metrics = dict[str, Array]

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[Any, Batch, Any], tuple[Float[Array, ""], Int[Array, ""]]]


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
    """Return a compiled function `step(state, batch) -> (state, metrics)`.

    The loss is the mean over all counted labels of the batch, also with several microbatches. The step donates its
    input state, so do not use that state again. Under `jax.set_mesh` the step runs on that mesh, and the new state has
    the sharding of `gpt2_jax.parallel.sharding`.

    Args:
        model: the model, whose loss is `gpt2_jax.loss.summed_loss`. If it has `lora` set, the state's `params` are the
            adapter, and its `frozen` are the parameters of the model.
        tx: any optax transformation. Gradients are already clipped when it receives them.
        seed: the seed of dropout. Step s uses `fold_in(key(seed), s)`.
        num_microbatches: split the batch into this many parts, which run one after the other, to save memory. It must
            divide the number of rows.
        max_grad_norm: clip gradients to this global norm; None disables clipping.
        ema_decay: update the moving average of the parameters, which the state must have (`init_state(..., ema=True)`).
        skip_non_finite: if the loss or gradient is not finite, keep parameters, optimizer state and average, and only
            count the step.

    Returns:
        The step. Its metrics are `loss`, in nats per label; `grad_norm`, before clipping; and `skipped`, the number of
        steps skipped so far.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from bridge import GPT2Config
        >>> from gpt2_jax import GPT2
        >>> from gpt2_jax.training import decay_mask, init_state, make_train_step
        >>> model = GPT2(GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2))
        >>> ids = jnp.arange(18).reshape(2, 9)
        >>> batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
        >>> params = model.init(jax.random.key(0), batch["input_ids"])["params"]
        >>> tx = optax.adamw(1e-2, weight_decay=0.1, mask=decay_mask)
        >>> train_step = make_train_step(model, tx)
        >>> state = init_state(params, tx)
        >>> for _ in range(3):
        ...     state, metrics = train_step(state, batch)
        >>> int(state.step), sorted(metrics)
        (3, ['grad_norm', 'loss', 'skipped'])
    """
    rates = (model.config.embd_pdrop, model.config.attn_pdrop, model.config.resid_pdrop)
    has_dropout = max(*rates, model.lora.dropout if model.lora else 0.0) > 0.0

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # Loss and gradients, summed over the labels of all microbatches.
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def total_loss(trained: Any, batch: Batch, key: Array) -> Float[Array, ""]:
            params, lora = model_variables(model, trained, state.frozen)
            return summed_loss(model, params, batch, key if has_dropout else None, lora=lora)

        value_and_grad = jax.value_and_grad(total_loss)
        total, grads = _summed_over_microbatches(value_and_grad, state.params, batch, key, num_microbatches)
        grads = constrain_tree(grads)  # each device needs only the sums of its own shard

        # The mean and the clipping are one factor, so that only the optimizer reads the gradients again.
        count = jnp.maximum((batch["labels"] != IGNORE_INDEX).sum(), 1)
        norm = optax.tree.norm(grads) / count
        factor = clip_factor(norm, max_grad_norm) / count
        grads = jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)

        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        mean = state.ema_params
        if ema_decay is not None:
            mean = optax.incremental_update(params, mean, ema_step_size(ema_decay, state.step - state.skipped + 1))

        after = TrainState(state.step + 1, params, opt_state, mean, state.skipped, state.frozen)
        if skip_non_finite:
            after = _skipped_unless(jnp.isfinite(total) & jnp.isfinite(norm), after, state)
        return constrain_tree(after), {"loss": total / count, "grad_norm": norm, "skipped": after.skipped}

    return jax.jit(step, donate_argnums=0)


def make_eval_step(model: GPT2) -> EvalStep:
    """Return a compiled `eval_step(params, batch, frozen) -> (summed loss in nats, number of counted labels)`.

    `params` and `frozen` are those of a `TrainState`; `frozen` is None if all parameters are trained.
    """

    @jax.jit
    def eval_step(trained: Any, batch: Batch, frozen: Any = None) -> tuple[Array, Array]:
        params, lora = model_variables(model, trained, frozen)
        return summed_loss(model, params, batch, lora=lora), (batch["labels"] != IGNORE_INDEX).sum()

    return eval_step


def ema_step_size(decay: float, updates: Int[Array, ""]) -> Float[Array, ""]:
    """Return the weight of the new parameters in their moving average: 1 - min(decay, (1 + t) / (10 + t)), t updates.

    The decay is warmed up, so that the initial weights do not dominate the average of a short run. Source:
    `num_updates` of TensorFlow's `tf.train.ExponentialMovingAverage`.
    """
    return jnp.maximum(1.0 - decay, 9.0 / (10.0 + updates))  # in Python floats: 1 - decay in float32 would be inexact


def _skipped_unless(finite: Bool[Array, ""], after: TrainState, before: TrainState) -> TrainState:
    """Return the updated state if the step was `finite`, otherwise the old state with the step counted as skipped."""
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
    return kept._replace(step=after.step, skipped=before.skipped + ~finite)


def _summed_over_microbatches(
    value_and_grad: Callable[..., tuple[Array, Any]], params: Any, batch: Batch, key: Array, num_microbatches: int
) -> tuple[Float[Array, ""], Any]:
    """Return the loss and its gradients, summed over the microbatches. One microbatch is in memory at a time."""
    if num_microbatches == 1:
        return value_and_grad(params, batch, key)
    # Microbatch k takes rows k, k+n, k+2n, ..., so that it has equally many rows from each device.
    split = {name: rows.reshape(-1, num_microbatches, *rows.shape[1:]).swapaxes(0, 1) for name, rows in batch.items()}

    def add(sums: tuple[Array, Any], microbatch: tuple[Batch, Array]) -> tuple[tuple[Array, Any], None]:
        total, grads = value_and_grad(params, *microbatch)
        return jax.tree.map(jnp.add, sums, (total, constrain_tree(grads))), None

    shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda rows: rows[0], split), key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, (split, jax.random.split(key, num_microbatches)))[0]

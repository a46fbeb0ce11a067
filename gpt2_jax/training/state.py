"""The training state: what it holds, and how it is created on a device mesh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from bridge import Checkpoint
from gpt2_jax.data import Data
from gpt2_jax.data.batches import Examples
from gpt2_jax.loading import sharded_params
from gpt2_jax.lora.parameters import lora_init
from gpt2_jax.model import GPT2
from gpt2_jax.ops.attention import require_device
from gpt2_jax.parallel.sharding import shardings
from gpt2_jax.training.config import TrainConfig
from gpt2_jax.training.errors import NonFiniteLoss, TrainingError
from gpt2_jax.training.partial import freeze_params

_LORA_STREAM = 2**31
"""Folded into the seed's key to draw the adapter. Dropout folds in the step, which is always less than this."""


class TrainState(NamedTuple):
    """Everything that a training step changes. Randomness and the position in the data derive from `step`."""

    step: Int[Array, ""]
    """The number of steps made."""
    params: Any
    """The Flax tree of parameters."""
    opt_state: Any
    """The state of the optax transformation."""
    ema_params: Any = None
    """The exponential moving average of the parameters, if enabled."""
    skipped: Any = None
    """The number of steps whose update was discarded because the loss or gradient was not finite."""
    frozen: Any = None
    """The parameters that are not trained, if there are any. With an adapter, they are the whole model, and `params`
    is the adapter. Checkpoints do not contain them."""


def init_state(params: Any, tx: optax.GradientTransformation, ema: bool = False, frozen: Any = None) -> TrainState:
    """Return the state before the first step, for `make_train_step`.

    Args:
        params: the parameters, for example from `model.init` or `gpt2_jax.from_pretrained`. They are not copied, and a
            training step donates its state, so do not use them afterwards.
        tx: the optimizer.
        ema: also keep an exponential moving average of the parameters.
        frozen: the parameters that are not trained: the second part of `freeze_params`, or those of the model if
            `params` is an adapter.
    """
    mean = jax.tree.map(jnp.copy, params) if ema else None  # copied: donated buffers must be distinct
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), mean, jnp.zeros((), jnp.int32), frozen)


def resolve_config(config: TrainConfig, data: Data, init_from: Checkpoint | None = None) -> TrainConfig:
    """Return the configuration with the final model sizes: the checkpoint's, or the tokenizer's vocabulary.

    Dropout rates are never taken from the checkpoint. `examples` "auto" becomes what suits the data. Raises
    `TrainingError` if the model has too few positions.
    """
    model = config.model
    if init_from is not None:
        rates = {name: getattr(model, name) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
        model = replace(init_from.config, **rates)
    elif data.tokenizer is not None:
        model = replace(model, vocab_size=data.tokenizer.vocab_size)
    if config.seq_len > model.n_positions:
        positions = model.n_positions
        raise TrainingError(
            f"seq_len={config.seq_len}: the model has n_positions={positions}; choose --seq-len {positions} or less"
        )
    return replace(config, model=model, examples=examples_of(config, data))


def examples_of(config: TrainConfig, data: Data) -> Examples:
    """Return the kind of examples: the configured one, or for "auto" the usual one for the data."""
    return data.usual_examples if config.examples == "auto" else config.examples


def make_model(config: TrainConfig) -> GPT2:
    """Return the model in the form that is trained. Raises `TrainingError` if the devices cannot run its attention."""
    try:
        require_device(config.attention)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    return GPT2(
        config.model,
        dtype=jnp.dtype(config.dtype),
        scan=config.scan,
        vocab_multiple=config.vocab_multiple,
        remat=config.remat,
        attention=config.attention,
        lora=config.lora if config.lora.rank else None,
    )


def initial_state(
    config: TrainConfig, model: GPT2, tx: optax.GradientTransformation, init_from: Checkpoint | None, mesh: Mesh
) -> TrainState:
    """Return the sharded state before the first step. Its values do not depend on the mesh.

    The weights come from the checkpoint `init_from`, or are drawn from the seed. Every device creates or reads only its
    own shards, so the model need not fit into one device.
    """
    placement = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, model, tx, mesh))
    if init_from is not None:
        params = sharded_params(
            init_from, mesh, param_dtype=jnp.float32, scan=config.scan, vocab_multiple=config.vocab_multiple
        )
        init = partial(_state_of, config, model, tx)
        return jax.jit(init, out_shardings=placement, donate_argnums=0)(params)
    # This program runs once. On CPU, optimizing it takes longer than the faster program saves.
    options = {"xla_backend_optimization_level": 1} if mesh.devices.flat[0].platform == "cpu" else None
    draw = jax.jit(random_state(config, model, tx), out_shardings=placement, compiler_options=options)
    return draw(*_init_arguments(config))


def abstract_state(config: TrainConfig, model: GPT2, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Return shape, dtype and sharding of each array of a state, without allocating it.

    Raises `MeshError` if the mesh does not divide the model.
    """
    shapes = jax.eval_shape(random_state(config, model, tx), *_init_arguments(config))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(shapes, mesh),
    )


def random_state(
    config: TrainConfig, model: GPT2, tx: optax.GradientTransformation
) -> Callable[[Any, Any], TrainState]:
    """Return a function from a random key and token ids to an unsharded state with random weights."""
    model = model.clone(attention="xla")  # it accepts every sequence length, and weights do not depend on it

    def init(key: Any, ids: Any) -> TrainState:
        return _state_of(config, model, tx, model.init(key, ids)["params"])

    return init


def split_params(config: TrainConfig, model: GPT2, params: Any) -> tuple[Any, Any]:
    """Return what is trained and what is frozen (None if nothing is). A new adapter is drawn from the seed."""
    if config.lora.rank:
        return lora_init(jax.random.fold_in(jax.random.key(config.seed), _LORA_STREAM), model), params
    return (params, None) if config.freeze is None else freeze_params(params, config.freeze)


def frozen_params(config: TrainConfig, model: GPT2, base: Checkpoint, mesh: Mesh) -> Any:
    """Return the frozen part of the base's parameters, on the mesh."""
    params = sharded_params(base, mesh, param_dtype=jnp.float32, scan=config.scan, vocab_multiple=config.vocab_multiple)
    return params if config.lora.rank else split_params(config, model, params)[1]


def _state_of(config: TrainConfig, model: GPT2, tx: optax.GradientTransformation, params: Any) -> TrainState:
    trained, frozen = split_params(config, model, params)
    return init_state(trained, tx, ema=config.ema_decay is not None, frozen=frozen)


def _init_arguments(config: TrainConfig) -> tuple[Any, Any]:
    return jax.random.key(config.seed), jnp.zeros((1, 1), jnp.int32)  # the shortest sequence compiles fastest


def require_finite(state: TrainState) -> None:
    """Raise `NonFiniteLoss` if a number in the state is NaN or infinite. A finite loss does not exclude that."""
    parts = {
        "weights": state.params,
        "the optimizer's state": state.opt_state,
        "the moving average of the weights": state.ema_params,
    }
    for what, tree in parts.items():
        if not all_finite(tree):
            raise NonFiniteLoss(f"step {state.step}: the update made {what} NaN or infinite")


@jax.jit
def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether all numbers in the tree are finite."""
    return jax.tree.reduce(lambda so_far, leaf: so_far & jnp.isfinite(leaf).all(), tree, jnp.array(True))

"""Before the first step: the configuration as it comes out, the model, and the state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from bridge import Checkpoint
from gpt2_jax.data import Data
from gpt2_jax.loading import sharded_params
from gpt2_jax.model import GPT2
from gpt2_jax.ops.attention import require_device
from gpt2_jax.parallel.sharding import shardings
from gpt2_jax.training.config import TrainConfig, TrainingError
from gpt2_jax.training.step import TrainState, init_state


def resolve_config(config: TrainConfig, data: Data, init_from: Checkpoint | None = None) -> TrainConfig:
    """The configuration with the model that it comes to: the checkpoint's sizes, or the tokenizer's vocabulary.

    Dropout is a matter of training, and stays as it was configured.
    """
    model = config.model
    if init_from is not None:
        rates = {name: getattr(model, name) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
        model = replace(init_from.config, **rates)
    elif data.tokenizer is not None:
        model = replace(model, vocab_size=data.tokenizer.max_token_value + 1)
    if config.seq_len > model.n_positions:
        positions = model.n_positions
        raise TrainingError(
            f"seq_len={config.seq_len}: the model has n_positions={positions}; choose --seq-len {positions} or less"
        )
    return replace(config, model=model)


def make_model(config: TrainConfig) -> GPT2:
    """The model in the form that it trains in; raises `TrainingError` where these devices do not run its attention."""
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
    )


def first_state(
    config: TrainConfig, model: GPT2, tx: optax.GradientTransformation, init_from: Checkpoint | None, mesh: Mesh
) -> TrainState:
    """Before the first step: weights from a checkpoint, or random ones drawn from the seed; the same on every mesh.

    Every device makes or reads its own parts alone, so that the model need not fit into one.
    """
    described = described_state(config, model, tx, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, described)
    if init_from is not None:
        params = sharded_params(
            init_from, mesh, param_dtype=jnp.float32, scan=config.scan, vocab_multiple=config.vocab_multiple
        )
        init = functools.partial(init_state, tx=tx, ema=config.ema_decay is not None)
        return jax.jit(init, out_shardings=places, donate_argnums=0)(params)
    # Drawn once: on CPU what the compiler would save in drawing by thinking longer is less than it takes to think.
    options = {"xla_backend_optimization_level": 1} if mesh.devices.flat[0].platform == "cpu" else None
    draw = jax.jit(state_from_seed(config, model, tx), out_shardings=places, compiler_options=options)
    return draw(*_init_arguments(config))


def described_state(config: TrainConfig, model: GPT2, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shape, dtype and place of each array of a state, without the arrays: a device may have room for one state.

    Raises `MeshError` where the mesh does not divide the model.
    """
    shapes = jax.eval_shape(state_from_seed(config, model, tx), *_init_arguments(config))
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings(shapes, mesh),
    )


def state_from_seed(
    config: TrainConfig, model: GPT2, tx: optax.GradientTransformation
) -> Callable[[Any, Any], TrainState]:
    model = model.clone(attention="xla")  # weights do not depend on it, and it alone takes sequences of any length

    def state(key: Any, ids: Any) -> TrainState:
        return init_state(model.init(key, ids)["params"], tx, ema=config.ema_decay is not None)

    return state


def _init_arguments(config: TrainConfig) -> tuple[Any, Any]:
    return jax.random.key(config.seed), jnp.zeros((1, 1), jnp.int32)  # the shortest compiles fastest

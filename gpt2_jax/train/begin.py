"""Before the first step: the configuration as it comes out, the model, and the state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bridge import Checkpoint
from gpt2_jax.attention import require_device
from gpt2_jax.data import Data
from gpt2_jax.model import GPT2
from gpt2_jax.pretrained import model_from_checkpoint
from gpt2_jax.train.config import TrainConfig, TrainingError
from gpt2_jax.train.step import TrainState, init_state


def settle(config: TrainConfig, data: Data, init_from: Checkpoint | None = None) -> TrainConfig:
    """The configuration with the model that it comes to: the checkpoint's sizes, or the tokenizer's vocabulary.

    Dropout is a matter of training, and stays as it was configured.
    """
    model = config.model
    if init_from is not None:
        rates = {name: getattr(model, name) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
        model = replace(init_from.config, **rates)
    elif data.tokenizer is not None:
        model = replace(model, vocab_size=data.tokenizer.max_token_value + 1)
    if config.length > model.n_positions:
        positions = model.n_positions
        raise TrainingError(
            f"length={config.length}: the model has n_positions={positions}; choose --length {positions} or less"
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
    config: TrainConfig, model: GPT2, tx: optax.GradientTransformation, init_from: Checkpoint | None
) -> TrainState:
    """Before the first step: weights from a checkpoint, or random ones drawn from the seed."""
    device = jax.local_devices()[0]
    if init_from is None:
        # Drawn once: on CPU what the compiler would save in drawing by thinking longer is less than it takes to think.
        options = {"xla_backend_optimization_level": 1} if device.platform == "cpu" else None
        state = jax.jit(_state_from_seed(config, model, tx), compiler_options=options)(*_init_arguments(config))
    else:
        params = model_from_checkpoint(
            init_from, param_dtype=jnp.float32, scan=config.scan, vocab_multiple=config.vocab_multiple
        )[1]
        state = init_state(params, tx, ema=config.ema_decay is not None)
    # Bound to the device, as what is restored from a checkpoint is: both run the same program.
    return jax.device_put(state, device)


def described_state(config: TrainConfig, model: GPT2, tx: optax.GradientTransformation) -> TrainState:
    """Shape, dtype and device of each array of a state, without the arrays: a device may have room for one state."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(_state_from_seed(config, model, tx), *_init_arguments(config))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)


def _state_from_seed(
    config: TrainConfig, model: GPT2, tx: optax.GradientTransformation
) -> Callable[[Any, Any], TrainState]:
    def state(key: Any, ids: Any) -> TrainState:
        return init_state(model.init(key, ids)["params"], tx, ema=config.ema_decay is not None)

    return state


def _init_arguments(config: TrainConfig) -> tuple[Any, Any]:
    return jax.random.key(config.seed), jnp.zeros((1, 1), jnp.int32)  # the shortest compiles fastest

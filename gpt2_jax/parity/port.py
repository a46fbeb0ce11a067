"""What the port, `gpt2_jax`, computes: the second of two sides with the same verbs.

Every verb takes and gives numpy, float64 where figures are compared, and keeps no parameters
afterwards. Matrix products run at the highest precision: GPUs and TPUs round float32 down otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import bridge
from bridge import Checkpoint
from gpt2_jax.loss import next_token_loss
from gpt2_jax.model import GPT2
from gpt2_jax.parity.sites import HEAD, Trace, input_site, is_output_site, torch_name
from gpt2_jax.parity.training import AdamW
from gpt2_jax.pretrained import to_device

NAME = "gpt2_jax"

F = TypeVar("F", bound=Callable[..., Any])


def exactly(function: F) -> F:
    """Run with float64 available and matrix products unrounded, without changing JAX for others."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.enable_x64(True), jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


@exactly
def logits(checkpoint: Checkpoint, ids: np.ndarray, mask: np.ndarray | None, dtype: str) -> np.ndarray:
    model, params = _model(checkpoint, dtype)
    return np.asarray(jax.jit(model.apply)({"params": params}, _array(ids), _array(mask))).astype(np.float64)


@exactly
def trace(checkpoint: Checkpoint, ids: np.ndarray, mask: np.ndarray | None) -> Trace:
    values: Trace = {}

    def keep(next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        name = torch_name(context.module.path) if context.method_name == "__call__" else ""
        if site := input_site(name):
            values[site] = _heads_merged(np.asarray(args[0]))
        output = next_call(*args, **kwargs)
        if is_output_site(name):
            values[name] = np.stack(output) if isinstance(output, tuple) else np.asarray(output)
        return output

    model, params = _model(checkpoint, "float64")
    with nn.intercept_methods(keep):
        values[HEAD] = np.asarray(model.apply({"params": params}, _array(ids), _array(mask)))
    return values


@exactly
def gradients(checkpoint: Checkpoint, ids: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """Of the loss on `ids`, per canonical name, in `dtype`."""
    model, params = _model(checkpoint, dtype)
    return bridge.to_torch(jax.jit(jax.grad(_loss(model)))(params, _array(ids)), checkpoint.config)


@exactly
def train(
    checkpoint: Checkpoint, batches: np.ndarray, dtype: str, adamw: AdamW
) -> tuple[list[float], dict[str, np.ndarray]]:
    """The loss before each step, and the weights after the last."""
    model, params = _model(checkpoint, dtype, scan=True)
    optimizer = optax.adamw(
        adamw.learning_rate, adamw.beta1, adamw.beta2, adamw.epsilon, weight_decay=adamw.weight_decay
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, ids: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(_loss(model))(params, ids)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = jax.jit(optimizer.init)(params)
    losses = []
    for ids in batches:
        params, state, loss = step(params, state, _array(ids))
        losses.append(float(loss))
    return losses, bridge.to_torch(params, checkpoint.config)


def _model(checkpoint: Checkpoint, dtype: str, scan: bool = False) -> tuple[GPT2, Any]:
    tree = bridge.to_flax(checkpoint.tensors, checkpoint.config, stacked=scan)
    params = jax.tree.map(lambda array: to_device(array, dtype), tree)
    return GPT2(checkpoint.config, jnp.dtype(dtype), jnp.dtype(dtype), scan), params


def _loss(model: GPT2) -> Callable[..., jax.Array]:
    def loss(params: Any, ids: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, ids)
        return next_token_loss(logits, ids)

    return loss


def _array(array: np.ndarray | None) -> Any:
    return None if array is None else jnp.asarray(array, jnp.int32)


def _heads_merged(x: np.ndarray) -> np.ndarray:
    """[B, T, H, K] as PyTorch's [B, T, D]; anything else as it is."""
    return x.reshape(*x.shape[:2], -1) if x.ndim == 4 else x

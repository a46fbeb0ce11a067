"""What `gpt2_jax` computes from a checkpoint. `torch_gpt2` has the same functions.

All functions take and return numpy arrays and keep no parameters afterwards. Matrix products run at the highest
precision, because GPUs and TPUs by default round float32 operands to a narrower format.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import bridge
from bridge import Checkpoint, GenerationConfig, SequenceClassifier
from bridge.storage.tensors import LazyTensor, LazyTensorMap, aligned_empty
from gpt2_jax.classification import GPT2ForSequenceClassification
from gpt2_jax.generation import Decoder
from gpt2_jax.loading import to_device
from gpt2_jax.model import GPT2
from gpt2_jax.ops.cross_entropy import cross_entropy, next_token_loss
from gpt2_jax.parity.activations import (
    LOGITS,
    Activations,
    Outputs,
    is_recorded_output,
    layer_outputs,
    next_labels,
    recorded_input,
    torch_name,
)
from gpt2_jax.parity.inputs import AdamW
from gpt2_jax.parity.precision import full_precision

NAME = "gpt2_jax"

BATCH_INVARIANT_NEW = 16
"""New tokens in the check of batch invariance."""


def logits(checkpoint: Checkpoint, ids: np.ndarray, mask: np.ndarray | None, dtype: str) -> np.ndarray:
    """Logits [B, T, V] in float64, computed in `dtype`."""
    with full_precision(dtype):
        model, params = _model(checkpoint, dtype)
        values = jax.jit(model.apply)({"params": params}, _array(ids), _array(mask))
        return np.asarray(values).astype(np.float64)


def activations(
    checkpoint: Checkpoint,
    ids: np.ndarray,
    mask: np.ndarray | None,
    is_kept: Callable[[str], bool] = lambda name: True,
) -> Activations:
    """All compared activations of a forward pass, computed in float64.

    Args:
        is_kept: whether to return the activation with this name. The others are not kept in memory.
    """
    values: Activations = {}

    def record(next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = torch_name(context.module.path) if context.method_name == "__call__" else ""
        if (name := recorded_input(module)) and is_kept(name):
            values[name] = _merge_heads(np.asarray(args[0]))
        output = next_call(*args, **kwargs)
        if is_recorded_output(module) and is_kept(module):
            values[module] = np.stack(output) if isinstance(output, tuple) else np.asarray(output)
        return output

    with full_precision("float64"), nn.intercept_methods(record):
        model, params = _model(checkpoint, "float64")
        logits = model.apply({"params": params}, _array(ids), _array(mask))
        if is_kept(LOGITS):
            values[LOGITS] = np.asarray(logits)
    return values


def outputs(
    checkpoint: Checkpoint,
    ids: np.ndarray,
    mask: np.ndarray | None,
    positions: np.ndarray,
    dtype: str,
    precision: str = "highest",
) -> Outputs:
    """Hidden states, logits and losses in float64, computed in `dtype`, one row at a time."""
    names = layer_outputs(checkpoint.config.n_layer)

    def run(params: Any, ids: jax.Array, mask: jax.Array | None, labels: jax.Array) -> tuple[jax.Array, ...]:
        layers = {}

        def record(next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            output = next_call(*args, **kwargs)
            module = torch_name(context.module.path) if context.method_name == "__call__" else ""
            if module in names:
                layers[module] = output[:, positions]
            return output

        with nn.intercept_methods(record):
            logits: Any = model.apply({"params": params}, ids, mask)
        states = jnp.stack([layers[name] for name in names], axis=2)
        return states, logits[:, positions], cross_entropy(logits[:, :-1], labels)

    with full_precision(dtype, precision):
        model, params = _model(checkpoint, dtype)
        compiled, rows = jax.jit(run), []
        for i in range(len(ids)):
            row, row_mask = ids[i : i + 1], None if mask is None else mask[i : i + 1]
            values = compiled(params, _array(row), _array(row_mask), _array(next_labels(row, row_mask)))
            rows.append([np.asarray(value).astype(np.float64) for value in values])
    return Outputs(*map(np.concatenate, zip(*rows, strict=True)))


def gradients(checkpoint: Checkpoint, ids: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """Gradients of the next-token loss by canonical parameter name, computed in `dtype`."""
    with full_precision(dtype):
        model, params = _model(checkpoint, dtype)
        return bridge.to_torch(jax.jit(jax.grad(_loss(model)))(params, _array(ids)), checkpoint.config)


def train(
    checkpoint: Checkpoint, batches: np.ndarray, dtype: str, adamw: AdamW
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Train one step per batch. Returns the loss before each step, and the final weights."""
    optimizer = optax.adamw(
        adamw.learning_rate, adamw.beta1, adamw.beta2, adamw.epsilon, weight_decay=adamw.weight_decay
    )
    with full_precision(dtype):
        model, params = _model(checkpoint, dtype, scan=True)

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


def generate(checkpoint: Checkpoint, prompts: np.ndarray, config: GenerationConfig) -> list[list[int]]:
    """The new ids for prompts [B, T], computed in float64. `config` asks for one output for each prompt."""
    with full_precision("float64"):
        outputs = Decoder(*_model(checkpoint, "float64")).generate(prompts.tolist(), config)
    return [output.ids for [output] in outputs]


def batch_invariant_outputs(checkpoint: Checkpoint, rows: list[list[int]], dtype: str) -> dict[str, int]:
    """Count the rows whose bits differ from those in one batch: alone, and without a cache.

    A few tokens are generated greedily after half of each row's tokens. Raises `BatchInvarianceError`.
    """
    new = min(BATCH_INVARIANT_NEW, checkpoint.config.n_positions // 4)
    prompts = [row[: max(1, len(row) // 2)] for row in rows]
    config = GenerationConfig(max(1, new), logprobs=True)
    decoder = Decoder(*_model(checkpoint, "float32"), dtype=jnp.dtype(dtype), batch_invariant=True)
    together = [output for [output] in decoder.generate(prompts, config)]
    alone = [decoder.generate([prompt], config)[0][0] for prompt in prompts]
    whole = decoder.token_logprobs([prompt + output.ids for prompt, output in zip(prompts, together, strict=True)])
    uncached = [found[len(prompt) - 1 :].tolist() for prompt, found in zip(prompts, whole, strict=True)]
    return {
        "alone vs in a batch": sum(a != b for a, b in zip(alone, together, strict=True)),
        "uncached vs cached": sum(a != b.logprobs for a, b in zip(uncached, together, strict=True)),
    }


def class_logits(classifier: SequenceClassifier, ids: np.ndarray, dtype: str) -> np.ndarray:
    """Logits of the classes [B, C] in float64, computed in `dtype`."""
    with full_precision(dtype):
        params = jax.tree.map(lambda array: to_device(array, dtype), classifier.to_flax())
        model = GPT2ForSequenceClassification(
            classifier.checkpoint.config,
            classifier.num_labels,
            classifier.pad_token_id,
            jnp.dtype(dtype),
            jnp.dtype(dtype),
        )
        values: Any = jax.jit(model.apply)({"params": params}, _array(ids))
        return np.asarray(values).astype(np.float64)


def _model(checkpoint: Checkpoint, dtype: str, scan: bool = False) -> tuple[GPT2, Any]:
    # Cast before stacking: layers may be stored in different dtypes.
    tree = bridge.to_flax(_cast(checkpoint.tensors, jnp.dtype(dtype)), checkpoint.config, stacked=scan)
    return GPT2(checkpoint.config, jnp.dtype(dtype), jnp.dtype(dtype), scan), jax.tree.map(to_device, tree)


def _cast(tensors: Mapping[str, np.ndarray], dtype: np.dtype) -> LazyTensorMap:
    """Cast each tensor when it is read, so that at most one is in memory in its stored dtype."""

    def cast(entry: LazyTensor) -> LazyTensor:
        def read() -> np.ndarray:
            array = aligned_empty(entry.shape, dtype)  # aligned, so that JAX on CPU does not copy it
            array[...] = entry.read()
            return array

        return LazyTensor(dtype, entry.shape, read)

    return LazyTensorMap({name: cast(entry) for name, entry in LazyTensorMap.of(tensors).entries.items()})


def _loss(model: GPT2) -> Callable[..., jax.Array]:
    def loss(params: Any, ids: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, ids)
        return next_token_loss(logits, ids)

    return loss


def _array(array: np.ndarray | None) -> Any:
    return None if array is None else jnp.asarray(array, jnp.int32)


def _merge_heads(x: np.ndarray) -> np.ndarray:
    """Reshape [B, T, H, K] to PyTorch's [B, T, D]. Other shapes are returned unchanged."""
    return x.reshape(*x.shape[:2], -1) if x.ndim == 4 else x

"""From a checkpoint to a model and its parameters on the device, and back to a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

import bridge
from bridge import Checkpoint
from bridge.arrays import contiguous
from gpt2_jax.model import GPT2


def from_pretrained(
    source: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    scan: bool = False,
    vocab_multiple: int = 1,
) -> tuple[GPT2, dict[str, Any]]:
    """The model of a checkpoint in any format, or of a Hugging Face id, and its parameters on the device.

    Args:
        dtype: of the computation.
        param_dtype: cast the parameters to this; None keeps them as they are stored.
        scan, vocab_multiple: as in `GPT2`.

    Raises a child of `bridge.BridgeError` for anything that is not a GPT-2 checkpoint.
    """
    checkpoint = bridge.load(source)
    return model_from_checkpoint(
        checkpoint, dtype=dtype, param_dtype=param_dtype, scan=scan, vocab_multiple=vocab_multiple
    )


def model_from_checkpoint(
    checkpoint: Checkpoint,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    scan: bool = False,
    vocab_multiple: int = 1,
) -> tuple[GPT2, dict[str, Any]]:
    """As `from_pretrained`, from a checkpoint that is already open."""
    tree = bridge.to_flax(checkpoint.tensors, checkpoint.config, stacked=scan, vocab_multiple=vocab_multiple)
    params = jax.tree.map(lambda array: to_device(array, param_dtype), tree)
    stored = params["wte"]["embedding"].dtype
    return GPT2(checkpoint.config, jnp.dtype(dtype), stored, scan, vocab_multiple), params


def checkpoint_from_params(model: GPT2, params: Mapping[str, Any], like: Checkpoint | None = None) -> Checkpoint:
    """The parameters as a checkpoint that `bridge.save` writes.

    `like`: the checkpoint that they were made from, whose tokenizer and harmless fields go along.
    """
    state = bridge.to_torch(params, model.config, vocab_multiple=model.vocab_multiple)
    return Checkpoint.of(state, model.config, like)


def to_device(array: np.ndarray, dtype: DTypeLike | None = None) -> jax.Array:
    """One array on the default device.

    On CPU a fresh array, as a file's tensors are, is adopted and not copied; one that somebody else
    holds is read-only (`TensorEntry.of`) and is copied.
    """
    if dtype is not None:
        array = array.astype(jnp.dtype(dtype), copy=False)
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise bridge.ConversionError(
            "the weights are float64, which JAX would cut to float32; set JAX_ENABLE_X64=1 or pass param_dtype"
        )
    # device_put adopts with may_alias=False too (JAX 0.10); jnp.array copies.
    return jax.device_put(contiguous(array)) if array.flags.writeable else jnp.array(array)

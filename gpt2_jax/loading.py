"""Conversion of a checkpoint to a model and its parameters on the device, and of parameters to a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

import bridge
from bridge import Checkpoint, padded_vocab_size
from bridge.conversion import STACK
from bridge.storage.tensors import LazyTensor, aligned_empty, contiguous
from gpt2_jax.model import GPT2
from gpt2_jax.parallel.sharding import shardings


def from_pretrained(
    source: str | Path,
    *,
    activation: str | None = None,
    drop_extra_heads: bool = False,
    base: str | Path | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    scan: bool = False,
    vocab_multiple: int = 1,
    mesh: Mesh | None = None,
) -> tuple[GPT2, dict[str, Any]]:
    """Load a model and its parameters from a checkpoint in any format or from a Hugging Face id.

    Args:
        activation: the activation of a nanoGPT file that does not state it; see `bridge.load`.
        drop_extra_heads: leave out the tensors of heads for other tasks. By default they are an error.
        base: for a LoRA adapter: the model that it changes, as a path or a Hugging Face id.
        dtype: the dtype of the computation.
        param_dtype: cast the parameters to this; None keeps the stored dtypes.
        scan, vocab_multiple: as in `GPT2`.
        mesh: shard the parameters over this mesh, from `gpt2_jax.parallel.sharding.make_mesh`; see `sharded_params`.

    Raises `bridge.BridgeError` for anything that is not a GPT-2 checkpoint.
    """
    checkpoint = bridge.load(source, activation=activation, drop_extra_heads=drop_extra_heads, base=base)
    return model_from_checkpoint(
        checkpoint, dtype=dtype, param_dtype=param_dtype, scan=scan, vocab_multiple=vocab_multiple, mesh=mesh
    )


def model_from_checkpoint(
    checkpoint: Checkpoint,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    scan: bool = False,
    vocab_multiple: int = 1,
    mesh: Mesh | None = None,
) -> tuple[GPT2, dict[str, Any]]:
    """Return the model and parameters of a checkpoint. The arguments are those of `from_pretrained`."""
    if mesh is not None:
        params = sharded_params(checkpoint, mesh, param_dtype=param_dtype, scan=scan, vocab_multiple=vocab_multiple)
        stored = params["wte"]["embedding"].dtype
        return GPT2(checkpoint.config, jnp.dtype(dtype), stored, scan, vocab_multiple), params
    tree = bridge.to_flax(checkpoint.tensors, checkpoint.config, stacked=scan, vocab_multiple=vocab_multiple)
    params = jax.tree.map(lambda array: to_device(array, param_dtype), tree)
    stored = params["wte"]["embedding"].dtype
    return GPT2(checkpoint.config, jnp.dtype(dtype), stored, scan, vocab_multiple), params


def sharded_params(
    checkpoint: Checkpoint,
    mesh: Mesh,
    *,
    param_dtype: DTypeLike | None = None,
    scan: bool = False,
    vocab_multiple: int = 1,
) -> dict[str, Any]:
    """Return the parameters, sharded over a mesh by the table in `gpt2_jax.parallel.sharding`.

    Tensors are read one at a time, and this process keeps only the shards of its devices. If the shards are rows and
    the format can read single rows, no other rows are read.

    Raises `MeshError` if the mesh does not divide a parameter, and another `bridge.BridgeError` if the tensors are not
    those of the model.
    """
    config = checkpoint.config
    entries = bridge.canonicalize(checkpoint.tensors, config).entries
    stored: dict[tuple[str, ...], list[_Stored]] = {}
    for parameter in bridge.parameters(config):
        stacks = scan and parameter.layer is not None
        path = (STACK, *parameter.flax_path[1:]) if stacks else parameter.flax_path
        rows = padded_vocab_size(config.vocab_size, vocab_multiple if parameter.has_vocabulary_rows else 1)
        shape = (rows if parameter.has_vocabulary_rows else parameter.flax_shape[0], *parameter.flax_shape[1:])
        entry = entries[parameter.torch_name]
        stored.setdefault(path, []).append(_Stored(parameter.torch_name, entry, parameter.flax_shape, shape, stacks))
    abstract = {path: _abstract_array(layers, param_dtype) for path, layers in stored.items()}
    sharding_of = flatten_dict(shardings(unflatten_dict(abstract), mesh))
    return unflatten_dict({path: _shard(layers, abstract[path], sharding_of[path]) for path, layers in stored.items()})


@dataclass(frozen=True)
class _Stored:
    """One tensor of a checkpoint, and its shape in the Flax tree, without and with vocabulary padding."""

    name: str
    entry: LazyTensor
    own_shape: tuple[int, ...]
    shape: tuple[int, ...]
    is_stacked: bool

    def copy_into(self, parts: Sequence[tuple[Part, np.ndarray]]) -> None:
        """Copy parts of the tensor into buffers. Padding rows are zero."""
        end = self.own_shape[0]
        first, last = min(part[0].start for part, _ in parts), min(end, max(part[0].stop for part, _ in parts))
        rows = np.empty((0, *self.own_shape[1:]), self.entry.dtype)
        if first < last:
            # The Flax tree may split the stored tensor's first axis into several.
            per_row = self.entry.shape[0] // end
            rows = self.entry.rows(first * per_row, last * per_row).reshape(last - first, *self.own_shape[1:])
        for part, target in parts:
            own = max(0, min(end, part[0].stop) - part[0].start)
            target[own:] = 0
            begin = part[0].start - first
            target[:own] = rows[(slice(begin, begin + own), *part[1:])]


Part = tuple[slice, ...]


def _abstract_array(layers: Sequence[_Stored], dtype: DTypeLike | None) -> jax.ShapeDtypeStruct:
    first = layers[0]
    if dtype is None and (other := next((s for s in layers if s.entry.dtype != first.entry.dtype), None)):
        raise bridge.ConversionError(
            f"{first.name} holds {first.entry.dtype}, {other.name} {other.entry.dtype}; layers of different dtypes "
            "cannot be stacked: pass param_dtype, or scan=False"
        )
    dtype = jnp.dtype(dtype or first.entry.dtype)
    _require_representable(dtype)
    return jax.ShapeDtypeStruct((len(layers), *first.shape) if first.is_stacked else first.shape, dtype)


def _shard(layers: Sequence[_Stored], whole: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
    """Return one parameter on this process's devices. Stacked parameters come from one tensor per layer."""
    buffers: dict[str, tuple[Part, np.ndarray]] = {}  # keyed by str(index): slices are not hashable before Python 3.12
    devices: Mapping[Any, Any] = sharding.addressable_devices_indices_map(whole.shape)
    for index in devices.values():
        part = tuple(slice(*axis.indices(size)) for axis, size in zip(index, whole.shape, strict=True))
        buffers.setdefault(str(index), (part, aligned_empty(sharding.shard_shape(whole.shape), whole.dtype)))
    for layer, stored in enumerate(layers):
        if stored.is_stacked:
            stored.copy_into([(part[1:], buffer[layer]) for part, buffer in buffers.values()])
        else:
            stored.copy_into([*buffers.values()])
    arrays = [jax.device_put(buffers[str(index)][1], device) for device, index in devices.items()]
    return jax.make_array_from_single_device_arrays(whole.shape, sharding, arrays)


def checkpoint_from_params(model: GPT2, params: Mapping[str, Any], like: Checkpoint | None = None) -> Checkpoint:
    """Return the parameters as a checkpoint, which `bridge.save` writes.

    Args:
        like: the checkpoint that the model was made from. Its tokenizer and unused fields are kept.
    """
    state = bridge.to_torch(params, model.config, vocab_multiple=model.vocab_multiple)
    return Checkpoint.of(state, model.config, like)


def to_device(array: np.ndarray, dtype: DTypeLike | None = None) -> jax.Array:
    """Return the array on the default device.

    On CPU, JAX takes over the memory of a writable array, such as a tensor read from a file. A read-only array
    (`LazyTensor.of`) belongs to the caller and is copied.
    """
    if dtype is not None:
        array = array.astype(jnp.dtype(dtype), copy=False)
    _require_representable(array.dtype)
    # device_put takes over memory even with may_alias=False (JAX 0.10); jnp.array copies.
    return jax.device_put(contiguous(array)) if array.flags.writeable else jnp.array(array)


def _require_representable(dtype: np.dtype) -> None:
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise bridge.ConversionError(
            "the weights are float64, which JAX would convert to float32; set JAX_ENABLE_X64=1 or pass param_dtype"
        )

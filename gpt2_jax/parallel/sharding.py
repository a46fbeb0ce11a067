"""Sharding of arrays over a mesh of devices, from one table of parameters.

A mesh has three axes. `data` shards the rows of the batch. `fsdp` also shards them, and shards the weights and the
optimizer state; the weights of a layer are all-gathered while it runs (Rajbhandari et al. 2020, "ZeRO"; Zhao et al.
2023, "PyTorch FSDP"). `tensor` shards the heads, the columns of the feed-forward network, and the vocabulary (Shoeybi
et al. 2019, "Megatron-LM").

This module only declares shardings. The compiler inserts the communication (Xu et al. 2021, "GSPMD").
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bridge import BridgeError
from bridge.errors import bullet_list
from bridge.parameter_table import DECAYS

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
AXES = (DATA, FSDP, TENSOR)
BATCH_AXES = (DATA, FSDP)
"""The axes that shard the rows of a batch."""

RULES = (
    (r"(wte|lm_head)/embedding", PartitionSpec((TENSOR, FSDP), None)),  # V D
    (r"wpe/embedding", PartitionSpec(None, FSDP)),  # P D
    (r"attn/c_attn/kernel", PartitionSpec(FSDP, None, TENSOR, None)),  # D 3 H K
    (r"attn/c_attn/bias", PartitionSpec(None, TENSOR, None)),  # 3 H K
    (r"attn/c_proj/kernel", PartitionSpec(TENSOR, None, FSDP)),  # H K D
    (r"mlp/c_fc/kernel", PartitionSpec(FSDP, TENSOR)),  # D F
    (r"mlp/c_fc/bias", PartitionSpec(TENSOR)),  # F
    (r"mlp/c_proj/kernel", PartitionSpec(TENSOR, FSDP)),  # F D
    (r"(attn|mlp)/c_proj/bias", PartitionSpec(None)),  # D
    (r"ln_[12f]/(scale|bias)", PartitionSpec(None)),  # D
)
"""(pattern for the end of a parameter's path, mesh axes of each of its axes), for one layer. Stacked layers have one
more first axis, which is never sharded. Small parameters are replicated.

fsdp shards the embeddings by vocabulary, not by width. Sharded by width, the gradients of the look-up and of the head
would be all-reduced in full for every microbatch; sharded by vocabulary, they are reduced to each device's shard. For
124M on four v5e chips with 40 microbatches, a device then sends 24 instead of 33 GB per step."""


class MeshError(BridgeError):
    """The devices cannot form the mesh, or the mesh does not divide an array. The message names both."""


def make_mesh(wanted: str = "data=-1", devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh from a description such as `data=2,fsdp=4,tensor=1`.

    Args:
        wanted: the size of each axis. Omitted axes have size 1. One axis may be -1, for all remaining devices.
        devices: the devices to use; by default, as many of `jax.devices()` as needed. Several processes must use all
            devices. With several TPU slices, each slice has its own part of the `data` axis.

    Raises `MeshError` if the devices cannot form the mesh.
    """
    found = list(jax.devices() if devices is None else devices)
    sizes = _sizes(wanted, len(found))
    count, slices = math.prod(sizes), _slices(found)
    if count > len(found) or (count < len(found) and len({device.process_index for device in found}) > 1):
        raise MeshError(
            f"--mesh {wanted}: needs {count} devices, and there are {len(found)}; give a --mesh for {len(found)}, or "
            f"simulate devices on CPU with XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    if slices > 1:
        if sizes[0] % slices:  # links between slices are ten times slower
            raise MeshError(f"--mesh {wanted}: data={sizes[0]} must be a multiple of the number of slices, {slices}")
        inside = (sizes[0] // slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            inside, (slices, 1, 1), found, allow_split_physical_axes=True, process_is_granule=False
        )
    else:
        grid = mesh_utils.create_device_mesh(sizes, found[:count], allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: Sequence[Any]) -> int:
    """Return the number of TPU slices. JAX also gives GPU machines a slice index, but any axis may span those."""
    on_tpu = devices[0].platform == "tpu"
    return len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1


def _sizes(wanted: str, available: int) -> tuple[int, ...]:
    sizes = dict.fromkeys(AXES, 1)
    given: list[str] = []
    for part in wanted.split(","):
        name, _, size = (text.strip() for text in part.partition("="))
        if name not in AXES or name in given or not re.fullmatch(r"-1|[1-9]\d{0,8}", size):
            raise MeshError(
                f"--mesh {wanted}: write data=.., fsdp=.. and tensor=.., each at most once, with positive numbers, or "
                "-1 in one of them for all remaining devices"
            )
        given.append(name)
        sizes[name] = int(size)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise MeshError(f"--mesh {wanted}: only one axis may be -1")
    if free:
        others = -math.prod(sizes.values())
        if available % others:
            raise MeshError(f"--mesh {wanted}: {others} does not divide the {available} devices")
        sizes[free[0]] = available // others
    return tuple(sizes.values())


def batch_parts(axes: Mapping[str, int]) -> int:
    """Return the number of shards of a batch, given the sizes of the mesh's axes."""
    return math.prod(axes.get(axis, 1) for axis in BATCH_AXES)


def spec_of(path: str, ndim: int) -> PartitionSpec:
    """Return the spec of a parameter, or of optimizer state under a parameter's path.

    Values that belong to no parameter, such as a step count, are replicated. Raises `KeyError` if no rule matches.
    """
    if not ndim or path.split("/")[-1] not in DECAYS:
        return PartitionSpec()
    for pattern, spec in RULES:
        if re.search(rf"(^|/){pattern}$", path):
            if ndim in (len(spec), len(spec) + 1):
                return spec if ndim == len(spec) else PartitionSpec(None, *spec)
            break
    raise KeyError(f"no rule for sharding {path} with {ndim} axes")


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Return the sharding of every leaf of a tree of parameters, optimizer state, or both.

    Raises `MeshError` if the mesh does not divide an axis.
    """
    specs = _specs(tree)
    leaves, names = jax.tree.leaves(tree), [name for name, _ in _named(tree)]
    problems = [
        problem
        for name, leaf, spec in zip(names, leaves, jax.tree.leaves(specs, is_leaf=_is_spec), strict=True)
        for problem in _problems(name, leaf.shape, spec, mesh)
    ]
    if problems:
        raise MeshError("the mesh does not divide the model:\n" + bullet_list(dict.fromkeys(problems)))
    return jax.tree.map(lambda spec: NamedSharding(mesh, _normalized(spec, mesh.shape)), specs, is_leaf=_is_spec)


def constrain_tree(tree: Any) -> Any:
    """Constrain every leaf to its sharding in the table, inside `jit`. Without a mesh, return the tree unchanged."""
    axes = axes_of_mesh()
    if not axes:
        return tree
    specs = jax.tree.map(lambda spec: _normalized(spec, axes), _specs(tree), is_leaf=_is_spec)
    return jax.lax.with_sharding_constraint(tree, specs)


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Constrain the sharding of `x` inside `jit`, for the mesh of `jax.set_mesh`.

    Args:
        axes: for each axis of `x`, the mesh axes that shard it; None replicates it.

    An axis of `x` is left unconstrained if the mesh does not have its mesh axes or does not divide it. If no constraint
    is left, `x` is returned unchanged.
    """
    mesh_axes = axes_of_mesh()
    if not mesh_axes:
        return x
    wanted = [_names(axis) for axis in axes]
    kept = [tuple(name for name in names if name in mesh_axes) for names in wanted]
    parts = [math.prod(mesh_axes[name] for name in names) for names in kept]
    kept = [names if size % n == 0 else () for names, n, size in zip(kept, parts, x.shape, strict=True)]
    if any(wanted) and not any(kept):
        return x
    free = PartitionSpec.UNCONSTRAINED
    spec = [names or (free if asked else None) for names, asked in zip(kept, wanted, strict=True)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def gathered(embedding: jax.Array, rows_axis: str | None = TENSOR) -> jax.Array:
    """Return an embedding that is sharded by `rows_axis` only, all-gathered over fsdp.

    Its gradient is constrained to the sharding in the table. The gradient that JAX derives would be all-gathered too.
    """
    return constrain(embedding, rows_axis, None)


@gathered.defjvp
def _gathered_jvp(
    rows_axis: str | None, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # The transpose of a constraint is the same constraint.
    tangent = constrain(tangents[0], (rows_axis, FSDP) if rows_axis else None, None)
    return gathered(*primals, rows_axis), tangent


def axes_of_mesh() -> dict[str, int]:
    """Return the sizes of this module's axes in the mesh of `jax.set_mesh`, empty if all sizes are 1.

    Only Auto axes are included. Along other axes, such as those of a `shard_map`, the caller has already sharded the
    arrays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    named = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    axes = {name: size for name, size, kind in named if name in AXES and kind == AxisType.Auto}
    return axes if math.prod(axes.values()) > 1 else {}


def require_auto_axes(tree: Any) -> None:
    """Raise `MeshError` if an array is sharded by Explicit axes of a mesh, which the model does not propagate."""
    for x in jax.tree.leaves(tree):
        sharding = getattr(jax.typeof(x), "sharding", None)
        names = {name for axis in getattr(sharding, "spec", ()) if axis is not None for name in _names(axis)}
        if names:
            raise MeshError(
                f"an array of shape {x.shape} is sharded by Explicit axes of its mesh, {', '.join(sorted(names))}; "
                "make the mesh with Auto axes, by gpt2_jax.make_mesh or with axis_types=(AxisType.Auto, ...) in "
                "jax.make_mesh, or wrap the call in jax.sharding.auto_axes"
            )


def _specs(tree: Any) -> Any:
    named = _named(tree)
    return jax.tree.unflatten(jax.tree.structure(tree), [spec_of(name, leaf.ndim) for name, leaf in named])


def _named(tree: Any) -> list[tuple[str, Any]]:
    """Return every leaf with its path of dictionary keys. Optimizer state has other nodes around the parameters."""
    return [
        ("/".join(str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey)), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _normalized(spec: PartitionSpec, axes: Mapping[str, int]) -> PartitionSpec:
    """Return `spec` without axes of size 1 and without trailing None, as the compiler normalizes it in its results.

    Equal specs avoid recompilation when a result is passed in again.
    """
    split = [tuple(name for name in _names(axis) if axes.get(name, 1) > 1) for axis in spec]
    while split and not split[-1]:
        split.pop()
    return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in split))


def _problems(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> Iterator[str]:
    for size, axis in zip(shape, spec, strict=False):
        sizes = {name: mesh.shape[name] for name in _names(axis) if mesh.shape.get(name, 1) > 1}
        parts = math.prod(sizes.values())
        if size % parts:
            product = " x ".join(f"{name}={count}" for name, count in sizes.items())
            is_vocabulary = TENSOR in _names(axis) and "embedding" in name
            hint = f"; pad the vocabulary, with --vocab-multiple {parts} or a multiple of it" if is_vocabulary else ""
            yield f"{name} has shape {tuple(shape)}, and {product} does not divide {size}{hint}"


def _names(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else axis or ()


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)

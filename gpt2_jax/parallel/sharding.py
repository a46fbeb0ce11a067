"""How arrays lie on a mesh of devices: one table for parameters, from which everything else follows.

A mesh has three axes. `data`: each device has all of the model and its own rows of the batch. `fsdp`: rows too, and
the model's weights and optimizer state in parts, of which a layer's are brought together while it runs (Rajbhandari
et al. 2020, "ZeRO"; Zhao et al. 2023, "PyTorch FSDP"). `tensor`: heads, the feed-forward's columns and the vocabulary
in parts (Shoeybi et al. 2019, "Megatron-LM").

Nothing here moves data: the compiler does, from what is said here (Xu et al. 2021, "GSPMD").
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
"""Over these the rows of a batch are spread."""

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
"""(end of a parameter's path, where its axes lie), for one layer; stacked layers have one more axis in front, which is
never split. What has few numbers is whole on every device.

The vocabulary and not the width of the embeddings goes over fsdp: in columns their two gradients, of looking up and of
the head, are added up whole on every device, for every part of a batch, and in rows into its own part (124M on four v5e
chips, 40 parts: a device sends 33 GB a step, and so 24)."""


class MeshError(BridgeError):
    """A mesh that cannot be made of these devices, or that does not divide an array; the message names both."""


def make_mesh(wanted: str = "data=-1", devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh as `data=2,fsdp=4,tensor=1` describes it. Axes left out have size 1; one may be -1, for all that is left.

    Args:
        devices: those to use; unless given, the first of `jax.devices()` that are enough, and all of them where
            several processes take part. Those of several TPU slices are parted by `data`.
    """
    found = list(jax.devices() if devices is None else devices)
    sizes = _sizes(wanted, len(found))
    count, slices = math.prod(sizes), _slices(found)
    if count > len(found) or (count < len(found) and len({device.process_index for device in found}) > 1):
        raise MeshError(f"--mesh {wanted}: {count} devices, and there are {len(found)}")
    if slices > 1:
        if sizes[0] % slices:  # within one, links are an order of magnitude faster than between them
            raise MeshError(f"--mesh {wanted}: data={sizes[0]} must be a multiple of the number of slices, {slices}")
        inside = (sizes[0] // slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            inside, (slices, 1, 1), found, allow_split_physical_axes=True, process_is_granule=False
        )
    else:
        grid = mesh_utils.create_device_mesh(sizes, found[:count], allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: Sequence[Any]) -> int:
    """How many TPU slices. JAX numbers the machines of GPUs by the same name, but any of their axes may span them."""
    on_tpu = devices[0].platform == "tpu"
    return len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1


def _sizes(wanted: str, available: int) -> tuple[int, ...]:
    sizes = dict.fromkeys(AXES, 1)
    given: list[str] = []
    for part in wanted.split(","):
        name, _, size = (text.strip() for text in part.partition("="))
        if name not in AXES or name in given or not re.fullmatch(r"-1|[1-9]\d{0,8}", size):
            raise MeshError(
                f"--mesh {wanted}: write data=.., fsdp=.. and tensor=.., each at most once, with numbers from 1 on, "
                "or -1 in one of them, for all devices that are left"
            )
        given.append(name)
        sizes[name] = int(size)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise MeshError(f"--mesh {wanted}: only one axis may be -1")
    if free:
        others = -math.prod(sizes.values())
        if available % others:
            raise MeshError(f"--mesh {wanted}: {others} does not divide the {available} devices that there are")
        sizes[free[0]] = available // others
    return tuple(sizes.values())


def batch_parts(axes: Mapping[str, int]) -> int:
    """Over how many devices the rows of a batch are spread, by the sizes of a mesh's axes."""
    return math.prod(axes.get(axis, 1) for axis in BATCH_AXES)


def spec_of(path: str, ndim: int) -> PartitionSpec:
    """Of a parameter, or of anything that goes with one under its path; raises KeyError where no rule is for it.

    What goes with none, as a count of steps or a coefficient of the optimizer, is whole on every device.
    """
    if not ndim or path.split("/")[-1] not in DECAYS:
        return PartitionSpec()
    for pattern, spec in RULES:
        if re.search(rf"(^|/){pattern}$", path):
            if ndim in (len(spec), len(spec) + 1):
                return spec if ndim == len(spec) else PartitionSpec(None, *spec)
            break
    raise KeyError(f"no rule says how {path} with {ndim} axes is spread over a mesh")


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Of every leaf of parameters, an optimizer's state, or both; raises `MeshError` where the mesh does not divide."""
    specs = _specs(tree)
    leaves, names = jax.tree.leaves(tree), [name for name, _ in _named(tree)]
    problems = [
        problem
        for name, leaf, spec in zip(names, leaves, jax.tree.leaves(specs, is_leaf=_is_spec), strict=True)
        for problem in _problems(name, leaf.shape, spec, mesh)
    ]
    if problems:
        raise MeshError("the mesh does not divide the model:\n" + bullet_list(dict.fromkeys(problems)))
    return jax.tree.map(lambda spec: NamedSharding(mesh, _over(spec, mesh.shape)), specs, is_leaf=_is_spec)


def constrain_tree(tree: Any) -> Any:
    """The same inside `jit`, with every leaf where the table has it; as it is where no such mesh is set."""
    axes = axes_of_mesh()
    if not axes:
        return tree
    specs = jax.tree.map(lambda spec: _over(spec, axes), _specs(tree), is_leaf=_is_spec)
    return jax.lax.with_sharding_constraint(tree, specs)


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """The same inside `jit`, its axes spread over these of the mesh that is set (`jax.set_mesh`), or over none.

    What the mesh does not have, or what does not divide an axis, says nothing of that axis; and where nothing is left
    to say, as on a mesh with other names, the array lies where it lay.
    """
    there = axes_of_mesh()
    wanted = [_names(axis) for axis in axes]
    kept = [tuple(name for name in names if name in there) for names in wanted]
    parts = [math.prod(there[name] for name in names) for names in kept]
    kept = [names if size % n == 0 else () for names, n, size in zip(kept, parts, x.shape, strict=True)]
    if not there or (any(wanted) and not any(kept)):
        return x
    unsaid = PartitionSpec.UNCONSTRAINED
    spec = [names or (unsaid if asked else None) for names, asked in zip(kept, wanted, strict=True)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(embedding: jax.Array, rows_axis: str | None = TENSOR) -> jax.Array:
    """An embedding of which every device has the rows of its part of the vocabulary. Its gradient goes straight to
    where the table has it; the derived one would be brought together as well."""
    return constrain(embedding, rows_axis, None)


def _gradient_of_gathered(rows_axis: str | None, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (constrain(gradient, (rows_axis, FSDP) if rows_axis else None, None),)


gathered.defvjp(lambda embedding, rows_axis: (gathered(embedding, rows_axis), None), _gradient_of_gathered)


def axes_of_mesh() -> dict[str, int]:
    """The axes of the mesh that is set that this module speaks of, with their sizes; none where they are all 1.

    Auto ones alone: over those of a `shard_map` the caller has spread the arrays already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    named = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    axes = {name: size for name, size, kind in named if name in AXES and kind == AxisType.Auto}
    return axes if math.prod(axes.values()) > 1 else {}


def _specs(tree: Any) -> Any:
    named = _named(tree)
    return jax.tree.unflatten(jax.tree.structure(tree), [spec_of(name, leaf.ndim) for name, leaf in named])


def _named(tree: Any) -> list[tuple[str, Any]]:
    """Every leaf with its path, of which only the keys of dictionaries count: those of parameters are dictionaries."""
    return [
        ("/".join(str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey)), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _over(spec: PartitionSpec, axes: Mapping[str, int]) -> PartitionSpec:
    """The same over axes of these sizes, as the compiler writes it in its results: what goes in like what came out runs
    the same program."""
    split = [tuple(name for name in _names(axis) if axes.get(name, 1) > 1) for axis in spec]
    while split and not split[-1]:
        split.pop()
    return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in split))


def _problems(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> Iterator[str]:
    for size, axis in zip(shape, spec, strict=False):
        sizes = {name: mesh.shape[name] for name in _names(axis) if mesh.shape.get(name, 1) > 1}
        parts = math.prod(sizes.values())
        if size % parts:
            over = " x ".join(f"{name}={count}" for name, count in sizes.items())
            is_vocabulary = TENSOR in _names(axis) and "embedding" in name
            cure = f"; pad the vocabulary, with --vocab-multiple {parts} or a multiple of it" if is_vocabulary else ""
            yield f"{name} has shape {tuple(shape)}, and {over} does not divide {size}{cure}"


def _names(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else axis or ()


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)

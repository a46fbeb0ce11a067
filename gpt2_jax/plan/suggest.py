"""Suggest a mesh: estimate memory and time of every mesh that divides the devices and the model.

Nothing is compiled, so memory and communication are estimates. Plan the suggested mesh to confirm it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

from bridge import padded_vocab_size
from gpt2_jax.hardware import TpuChip
from gpt2_jax.ops.cross_entropy import default_chunk_bytes
from gpt2_jax.parallel.sharding import AXES, MeshError, shardings
from gpt2_jax.plan.memory import (
    DTYPE_BYTES,
    FLOAT32_BYTES,
    StateBytes,
    device_bytes,
    layer_parameters,
    saved_activation_bytes,
)
from gpt2_jax.plan.roofline import RING_LINKS, Roofline, roofline
from gpt2_jax.plan.topology import Topology
from gpt2_jax.training import TrainConfig, TrainState

MEMORY_FRACTION = 0.83
"""Maximum fraction of the memory that an estimate may use. The compiler's peaks, which include copies in other layouts
and partly filled tiles, were 0.80 to 1.20 times the estimates (124M and 1.5B on v5e, 4 to 256 chips)."""


@dataclass(frozen=True)
class Suggestion:
    """A mesh and a number of microbatches, with their estimates."""

    mesh: Mapping[str, int]
    batch_size: int
    num_microbatches: int
    memory_bytes: int
    """Peak on a device."""
    roofline: Roofline

    @property
    def flags(self) -> str:
        """The flags of `gpt2 train` that select it."""
        sizes = {axis: size for axis, size in self.mesh.items() if size > 1} or {"data": 1}
        mesh = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        return f"--mesh {mesh} --batch-size {self.batch_size} --num-microbatches {self.num_microbatches}"


def suggest(config: TrainConfig, state: TrainState, topology: Topology) -> Suggestion | None:
    """The suggestion with the lowest serial time that fits. Ties go to the fewest microbatches.

    The batch size is the configured one if a mesh divides it, and otherwise the nearest multiple of the number of
    devices. Returns None if nothing fits, or for CPU devices.
    """
    chip, devices = topology.chip, len(topology.devices)
    if chip is None:
        return None
    meshes = [mesh for mesh in possible_meshes(devices, topology.slices) if can_shard(state, mesh)]
    sizes = [config.batch_size]
    if not any(config.batch_size % (mesh["data"] * mesh["fsdp"]) == 0 for mesh in meshes):
        sizes = [devices * max(1, round(config.batch_size / devices))]
    found = [
        candidate
        for size in sizes
        for mesh in meshes
        for candidate in _candidates(replace(config, batch_size=size, num_microbatches=1), mesh, state, topology, chip)
    ]
    return min(found, key=lambda s: (s.roofline.serial_seconds, s.num_microbatches, s.mesh["tensor"]), default=None)


def possible_meshes(devices: int, slices: int = 1) -> Iterator[dict[str, int]]:
    """All meshes with this number of devices. The `data` axis is a multiple of the number of slices."""
    for data in _divisors(devices):
        for fsdp in _divisors(devices // data):
            if data % slices == 0:
                yield dict(zip(AXES, (data, fsdp, devices // data // fsdp), strict=True))


def can_shard(state: TrainState, mesh: Mapping[str, int]) -> bool:
    """Whether the mesh divides every array of the state."""
    try:
        shardings(state, _abstract(mesh))
    except MeshError:
        return False
    return True


def _abstract(mesh: Mapping[str, int]) -> Any:
    return jax.sharding.AbstractMesh(tuple(mesh.values()), tuple(mesh))


def state_bytes_on(config: TrainConfig, state: TrainState, mesh: Mapping[str, int]) -> StateBytes:
    """Exact sizes on one device of this mesh. `state` may be sharded over another mesh."""

    def place(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    placed = jax.tree.map(place, state, shardings(state, _abstract(mesh)))
    rows = config.batch_size // (mesh["data"] * mesh["fsdp"])
    return StateBytes(
        parameters=device_bytes(placed.params),
        optimizer=device_bytes(placed.opt_state),
        ema=device_bytes(placed.ema_params),
        batch=2 * FLOAT32_BYTES * rows * config.seq_len,  # ids and labels in int32, which is as wide as float32
        frozen=device_bytes(placed.frozen),
    )


def _candidates(
    config: TrainConfig, mesh: dict[str, int], state: TrainState, topology: Topology, chip: TpuChip
) -> Iterator[Suggestion]:
    """One suggestion for each number of microbatches with which this mesh fits."""
    sizes = state_bytes_on(config, state, mesh)
    for num_microbatches in _microbatch_counts(config.batch_size, mesh["data"] * mesh["fsdp"]):
        split = replace(config, num_microbatches=num_microbatches)
        memory = estimated_memory(split, mesh, sizes)
        if memory <= MEMORY_FRACTION * chip.hbm_available:
            links, network = estimated_traffic(split, mesh, topology.slices)
            line = roofline(split, mesh, sizes, links / RING_LINKS, network, chip)
            yield Suggestion(mesh, config.batch_size, num_microbatches, memory, line)


def estimated_memory(config: TrainConfig, mesh: Mapping[str, int], state: StateBytes) -> int:
    """Estimated peak of a device, in bytes.

    The sum of the state, the gradients and their accumulator, saved activations, the unsharded embedding and its
    gradients, one chunk of logits with its gradients, and the weights of two layers.
    """
    width, c = DTYPE_BYTES[config.dtype], config.model
    embedding = padded_vocab_size(c.vocab_size, config.vocab_multiple) * c.n_embd // mesh["tensor"]
    gradients = state.parameters * (2 if config.num_microbatches > 1 else 1)
    embeddings = embedding * (width + width + FLOAT32_BYTES)  # weights; gradients of the look-up, and of the head
    logits = default_chunk_bytes() * 2 // mesh["tensor"]
    layers = 2 * width * layer_parameters(config) // c.n_layer // mesh["tensor"]  # one runs while the next is gathered
    return state.total + gradients + saved_activation_bytes(config, mesh) + embeddings + logits + layers


def estimated_traffic(config: TrainConfig, mesh: Mapping[str, int], slices: int = 1) -> tuple[float, float]:
    """Estimated bytes that a device sends per step, within and between slices.

    - `fsdp`: each microbatch all-gathers the layers' weights in both passes and reduce-scatters their gradients.
      The embedding is all-gathered once per step.
    - `data`: each microbatch all-reduces the layers' gradients.
    - `data` and `fsdp`: each microbatch all-reduces the gradients of the unsharded embedding.
    - `tensor`: all-reduces of the activations, two per layer and pass.
    """
    width, c = DTYPE_BYTES[config.dtype], config.model
    data, fsdp, tensor = (mesh[axis] for axis in AXES)
    layers = width * layer_parameters(config) / tensor
    embedding = padded_vocab_size(c.vocab_size, config.vocab_multiple) * c.n_embd / tensor
    activations = width * c.n_embd * config.seq_len * config.batch_size / (data * fsdp)
    weights = 3 * layers * _ring_fraction(fsdp)
    over_data = 2 * layers / fsdp * _ring_fraction(data)
    embeddings = 2 * embedding * (width + FLOAT32_BYTES) * _ring_fraction(data * fsdp)
    over_tensor = 4 * 2 * c.n_layer * activations * _ring_fraction(tensor)
    per_microbatch = weights + over_data + embeddings
    total = config.num_microbatches * per_microbatch + over_tensor + width * embedding * _ring_fraction(fsdp)
    if slices == 1:
        return total, 0.0
    network = config.num_microbatches * (over_data + embeddings)
    return total - network, network


def _ring_fraction(group_size: int) -> float:
    """The fraction of an array that each device of a ring sends in an all-gather or a reduce-scatter."""
    return (group_size - 1) / group_size


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _microbatch_counts(batch_size: int, devices: int) -> list[int]:
    """Numbers of microbatches that divide the batch, such that the devices divide each microbatch."""
    return [] if batch_size % devices else _divisors(batch_size // devices)

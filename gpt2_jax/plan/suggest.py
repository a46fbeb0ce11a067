"""The mesh that it would take: every one that divides the devices and the model, by arithmetic alone.

Nothing here is compiled, so memory and communication are estimates; what is suggested is to be planned in turn.
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
from gpt2_jax.plan.memory import FLOAT32, WIDTH, State, device_bytes, kept_bytes, layer_parameters
from gpt2_jax.plan.roofline import RING_LINKS, Roofline, estimate
from gpt2_jax.plan.topology import Topology
from gpt2_jax.training import TrainConfig, TrainState

MARGIN = 0.83
"""Of the memory: what an estimate may fill. The compiler's peaks, which have copies in other layouts and tiles that are
partly filled, were 0.80 to 1.20 times the estimates (124M and 1.5B on v5e, 4 to 256 chips)."""


@dataclass(frozen=True)
class Suggestion:
    """A mesh, how many parts a step has, and what that comes to by estimate."""

    mesh: Mapping[str, int]
    batch_size: int
    num_microbatches: int
    needed: int
    """Bytes on a device."""
    roofline: Roofline

    @property
    def flags(self) -> str:
        """As `gpt2 train` takes them."""
        sizes = {axis: size for axis, size in self.mesh.items() if size > 1} or {"data": 1}
        mesh = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        return f"--mesh {mesh} --batch-size {self.batch_size} --num-microbatches {self.num_microbatches}"


def suggest(config: TrainConfig, state: TrainState, topology: Topology) -> Suggestion | None:
    """The fastest that fits, communication and arithmetic in turn; of equally fast ones the one in the fewest parts.
    None where nothing fits, or no chip is named.

    The batch is the configured one where that can be spread over all devices, else the nearest that can.
    """
    chip, devices = topology.chip, len(topology.devices)
    if chip is None:
        return None
    meshes = [mesh for mesh in possible_meshes(devices, topology.slices) if divides(state, mesh)]
    sizes = [config.batch_size]
    if not any(config.batch_size % (mesh["data"] * mesh["fsdp"]) == 0 for mesh in meshes):
        sizes = [devices * max(1, round(config.batch_size / devices))]
    found = [
        candidate
        for size in sizes
        for mesh in meshes
        for candidate in _candidates(replace(config, batch_size=size, num_microbatches=1), mesh, state, topology, chip)
    ]
    return min(found, key=lambda s: (s.roofline.in_turn, s.num_microbatches, s.mesh["tensor"]), default=None)


def possible_meshes(devices: int, slices: int = 1) -> Iterator[dict[str, int]]:
    """Every way to part so many devices over the three axes; slices are parted by `data`."""
    for data in _divisors(devices):
        for fsdp in _divisors(devices // data):
            if data % slices == 0:
                yield dict(zip(AXES, (data, fsdp, devices // data // fsdp), strict=True))


def divides(state: TrainState, mesh: Mapping[str, int]) -> bool:
    """Whether the table of shardings takes this model on this mesh."""
    try:
        shardings(state, _abstract(mesh))
    except MeshError:
        return False
    return True


def _abstract(mesh: Mapping[str, int]) -> Any:
    """A mesh of no devices, which says how large a part is."""
    return jax.sharding.AbstractMesh(tuple(mesh.values()), tuple(mesh))


def spread_state(config: TrainConfig, state: TrainState, mesh: Mapping[str, int]) -> State:
    """Bytes of a device on this mesh, to the byte, of a state that is described for another."""

    def part(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    moved = jax.tree.map(part, state, shardings(state, _abstract(mesh)))
    rows = config.batch_size // (mesh["data"] * mesh["fsdp"])
    return State(
        device_bytes(moved.params),
        device_bytes(moved.opt_state),
        device_bytes(moved.ema_params),
        2 * FLOAT32 * rows * config.seq_len,  # ids and labels, of which a number has as many bytes
    )


def _candidates(
    config: TrainConfig, mesh: dict[str, int], state: TrainState, topology: Topology, chip: TpuChip
) -> Iterator[Suggestion]:
    """On a mesh, those that fit: in one part, or in several."""
    spread = spread_state(config, state, mesh)
    for parts in _parts(config.batch_size, mesh["data"] * mesh["fsdp"]):
        in_parts = replace(config, num_microbatches=parts)
        needed = needed_bytes(in_parts, mesh, spread)
        if needed <= MARGIN * chip.hbm_available:
            links, network = sent_bytes(in_parts, mesh, topology.slices)
            line = estimate(in_parts, mesh, spread, links / RING_LINKS, network, chip)
            yield Suggestion(mesh, config.batch_size, parts, needed, line)


def needed_bytes(config: TrainConfig, mesh: Mapping[str, int], state: State) -> int:
    """Of a device: the state, gradients and their sums, kept activations, the embedding and its gradients whole, the
    logits of a chunk with their gradients, and a layer's weights."""
    width, c = WIDTH[config.dtype], config.model
    embedding = padded_vocab_size(c.vocab_size, config.vocab_multiple) * c.n_embd // mesh["tensor"]
    gradients = state.parameters * (2 if config.num_microbatches > 1 else 1)
    whole = embedding * (width + width + FLOAT32)  # gathered; the look-up's gradient; the head's
    logits = default_chunk_bytes() * 2 // mesh["tensor"]
    layer = 2 * width * layer_parameters(config) // c.n_layer // mesh["tensor"]  # one runs while the next comes in
    return state.total + gradients + kept_bytes(config, mesh) + whole + logits + layer


def sent_bytes(config: TrainConfig, mesh: Mapping[str, int], slices: int = 1) -> tuple[float, float]:
    """By a device in a step, over links and across slices: a layer's weights come together for both passes and their
    gradients are added up in parts, once a part of the batch; so are the embedding's, whole; over `tensor`, each
    layer's activations are added up twice in each pass."""
    width, c = WIDTH[config.dtype], config.model
    data, fsdp, tensor = (mesh[axis] for axis in AXES)
    layers = width * layer_parameters(config) / tensor
    embedding = padded_vocab_size(c.vocab_size, config.vocab_multiple) * c.n_embd / tensor
    activations = width * c.n_embd * config.seq_len * config.batch_size / (data * fsdp)
    weights = 3 * layers * _share(fsdp)
    over_data = 2 * layers / fsdp * _share(data)
    embeddings = 2 * embedding * (width + FLOAT32) * _share(data * fsdp)
    over_tensor = 4 * 2 * c.n_layer * activations * _share(tensor)
    a_part = weights + over_data + embeddings
    links = config.num_microbatches * a_part + over_tensor + width * embedding * _share(fsdp)
    if slices == 1:
        return links, 0.0
    network = config.num_microbatches * (over_data + embeddings)
    return links - network, network


def _share(group: int) -> float:
    """Of an array, what each of a group in a ring passes on to bring it together."""
    return (group - 1) / group


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _parts(batch_size: int, spread: int) -> list[int]:
    """Into how many parts a batch can be divided, each spread over so many devices."""
    return [] if batch_size % spread else _divisors(batch_size // spread)

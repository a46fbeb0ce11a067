"""Plan a training step on a topology, or on a series of topologies for weak scaling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import bridge
from bridge import BridgeError
from gpt2_jax.parallel.sharding import MeshError, make_mesh
from gpt2_jax.plan.communication.collectives import Collectives, find_collectives
from gpt2_jax.plan.compiled import AbstractStep, Program, compile_step, describe_step
from gpt2_jax.plan.errors import PlanError
from gpt2_jax.plan.memory import Peak, StateBytes, peak_memory, saved_activation_bytes, state_bytes
from gpt2_jax.plan.roofline import Roofline, program_roofline
from gpt2_jax.plan.suggest import Suggestion, suggest
from gpt2_jax.plan.topology import Topology, tpu_topology
from gpt2_jax.training import TrainConfig, TrainingError

Say = Callable[[str], None]
"""Displays the current activity."""


@dataclass(frozen=True)
class Plan:
    """Memory, communication and time of a step. Bytes are per device."""

    config: TrainConfig
    topology: Topology
    mesh: dict[str, int]
    state: StateBytes
    program: Program
    peak: Peak
    collectives: Collectives | None
    """None if the program does not fit, because the compiler then returns no program."""
    roofline: Roofline | None
    """None if there is no program, or for CPU devices."""
    suggestion: Suggestion | None
    slice_ids: tuple[int, ...]
    """The slice of every device, in the order of the mesh."""

    @property
    def fits(self) -> bool:
        return self.peak.missing == 0 and self.program.text is not None

    @property
    def num_devices(self) -> int:
        return self.mesh["data"] * self.mesh["fsdp"] * self.mesh["tensor"]

    @property
    def saved_activation_bytes(self) -> int:
        return saved_activation_bytes(self.config, self.mesh)

    @property
    def num_parameters(self) -> int:
        return bridge.num_parameters(self.config.model)


@dataclass(frozen=True)
class ScalingPoint:
    """One size of weak scaling: its plan, or why it cannot be planned."""

    chips: int
    topology: str
    plan: Plan | None
    failure: str | None = None


def make_plan(config: TrainConfig, topology: Topology, say: Say = lambda _: None) -> Plan:
    """Compile a step for the configuration's mesh and plan it.

    Raises:
        PlanError: the mesh does not divide the model or the batch. The message suggests one that does.
    """
    _require_plannable(config)
    unsharded = describe_step(
        replace(config, batch_size=1, num_microbatches=1), make_mesh("data=1", topology.devices[:1])
    )
    suggestion = suggest(config, unsharded.state, topology)
    try:
        mesh = make_mesh(config.mesh, topology.devices)
        step = describe_step(config, mesh)
    except (MeshError, TrainingError) as error:
        hint = "" if suggestion is None else f"; the fastest estimate on {topology.name} is {suggestion.flags}"
        raise PlanError(f"{error}{hint}") from error
    say(f"compiling for {topology.name}")
    return plan_program(step, compile_step(step), topology, suggestion)


def plan_program(
    step: AbstractStep, program: Program, topology: Topology, suggestion: Suggestion | None = None
) -> Plan:
    """Plan a step from its compiled program."""
    chip, mesh = topology.chip, dict(step.mesh.shape)
    slice_ids = tuple(getattr(device, "slice_index", None) or 0 for device in step.mesh.devices.flat)
    state = state_bytes(step)
    collectives = None if program.text is None else find_collectives(program.text, slice_ids)
    roofline = None
    if collectives is not None and chip is not None:
        roofline = program_roofline(step.config, mesh, state, collectives, slice_ids, chip)
    peak = peak_memory(program, None if chip is None else chip.hbm_available)
    return Plan(step.config, topology, mesh, state, program, peak, collectives, roofline, suggestion, slice_ids)


def weak_scaling(config: TrainConfig, topology: Topology, say: Say = lambda _: None) -> list[ScalingPoint]:
    """Plan 1 to 256 chips of the topology's kind, with the same number of sequences per chip.

    Raises:
        PlanError: the topology is not a single TPU slice, the mesh does not grow with the devices, or the batch is not
            a multiple of the devices.
    """
    chip, devices = topology.chip, len(topology.devices)
    if chip is None:
        raise PlanError("--scaling is only available for TPU chips: give --topology")
    if len({getattr(device, "slice_index", 0) for device in topology.devices}) > 1:
        raise PlanError("--scaling covers sizes up to one slice: give a topology without *N")
    if "-1" not in config.mesh:
        raise PlanError(f"--scaling needs a mesh that grows, with -1 for one axis: --mesh {config.mesh} is fixed")
    if config.batch_size % (devices * config.num_microbatches):
        raise PlanError(
            f"--scaling: batch_size={config.batch_size} is not a multiple of num_microbatches x chips = "
            f"{config.num_microbatches} x {devices}; choose a --batch-size that is a multiple of "
            f"{devices * config.num_microbatches}"
        )
    points = []
    for chips, shape in chip.sizes.items():
        name = f"{chip.name}:{shape}"
        scaled = replace(config, batch_size=config.batch_size // devices * chips)
        try:
            points.append(ScalingPoint(chips, name, make_plan(scaled, tpu_topology(name), say)))
        except BridgeError as error:
            points.append(ScalingPoint(chips, name, None, str(error).splitlines()[0]))
    return points


def _require_plannable(config: TrainConfig) -> None:
    """Reject values that `gpt2 train` would change after it has opened its files. A plan opens no files."""
    positions = config.model.n_positions
    if config.seq_len > positions:
        raise PlanError(f"--seq-len {config.seq_len}: the model has n_positions={positions}; choose that or less")
    if config.init_from is not None:
        raise PlanError("--init-from: a plan opens no weights; give the sizes with --preset or their own flags")

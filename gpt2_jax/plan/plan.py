"""A plan: one training step on devices that are not here, and a row of them, from one chip to many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import bridge
from bridge import BridgeError
from gpt2_jax.parallel.sharding import MeshError, make_mesh
from gpt2_jax.plan.collectives import Exchange, exchange
from gpt2_jax.plan.compiled import Program, Step, compile_step, described_step
from gpt2_jax.plan.errors import PlanError
from gpt2_jax.plan.memory import Peak, State, kept_bytes, peak, state_bytes
from gpt2_jax.plan.roofline import Roofline, roofline
from gpt2_jax.plan.suggest import Suggestion, suggest
from gpt2_jax.plan.topology import Topology, tpu_topology
from gpt2_jax.training import TrainConfig, TrainingError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What a step takes; bytes are a device's."""

    config: TrainConfig
    topology: Topology
    mesh: dict[str, int]
    state: State
    program: Program
    peak: Peak
    exchange: Exchange | None
    """None where the compiler refused the program."""
    roofline: Roofline | None
    """None without a program, or without a chip."""
    suggestion: Suggestion | None
    slices: tuple[int, ...]
    """Of each device in the mesh's order, the slice that it is in."""

    @property
    def fits(self) -> bool:
        return self.peak.missing == 0 and self.program.text is not None

    @property
    def kept(self) -> int:
        return kept_bytes(self.config, self.mesh)

    @property
    def parameters(self) -> int:
        return bridge.num_parameters(self.config.model)


@dataclass(frozen=True)
class Point:
    """Of weak scaling: a number of chips with the plan for them, or why there is none."""

    chips: int
    topology: str
    plan: Plan | None
    failure: str | None = None


def make_plan(config: TrainConfig, topology: Topology, say: Say = lambda _: None) -> Plan:
    """Compile a step of `config` for its mesh of these devices; raises `PlanError` where the mesh does not divide it,
    with one that does."""
    _require_plannable(config)
    whole = described_step(replace(config, batch_size=1, num_microbatches=1), make_mesh("data=1", topology.devices[:1]))
    suggestion = suggest(config, whole.state, topology)
    try:
        mesh = make_mesh(config.mesh, topology.devices)
        step = described_step(config, mesh)
    except (MeshError, TrainingError) as error:
        other = "" if suggestion is None else f"; by estimate, {suggestion.flags} is the fastest on {topology.name}"
        raise PlanError(f"{error}{other}") from error
    say(f"compiling for {topology.name}")
    return planned(step, compile_step(step), topology, suggestion)


def planned(step: Step, program: Program, topology: Topology, suggestion: Suggestion | None = None) -> Plan:
    """What the compiled program comes to."""
    chip, mesh = topology.chip, dict(step.mesh.shape)
    slices = tuple(getattr(device, "slice_index", None) or 0 for device in step.mesh.devices.flat)
    state = state_bytes(step)
    found = None if program.text is None else exchange(program.text, slices)
    line = None if found is None or chip is None else roofline(step.config, mesh, state, found, slices, chip)
    needed = peak(program, None if chip is None else chip.hbm_available)
    return Plan(step.config, topology, mesh, state, program, needed, found, line, suggestion, slices)


def weak_scaling(config: TrainConfig, topology: Topology, say: Say = lambda _: None) -> list[Point]:
    """The same rows for each chip in as many parts, from one chip to 256 of this topology's kind.

    Raises `PlanError` where the mesh does not grow with the devices.
    """
    chip, devices = topology.chip, len(topology.devices)
    if chip is None:
        raise PlanError("--scaling is about chips: give --topology")
    if len({getattr(device, "slice_index", 0) for device in topology.devices}) > 1:
        raise PlanError("--scaling goes from one chip to one slice: give a topology without *N")
    if "-1" not in config.mesh:
        raise PlanError(
            f"--scaling needs a mesh that grows: -1 for one of its axes, which --mesh {config.mesh} has not"
        )
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
            points.append(Point(chips, name, make_plan(scaled, tpu_topology(name), say)))
        except BridgeError as error:
            points.append(Point(chips, name, None, str(error).splitlines()[0]))
    return points


def _require_plannable(config: TrainConfig) -> None:
    """Raise for what training would resolve_config with files that a plan does not open."""
    positions = config.model.n_positions
    if config.seq_len > positions:
        raise PlanError(f"--seq-len {config.seq_len}: the model has n_positions={positions}; choose no more")
    if config.init_from is not None:
        raise PlanError("--init-from: a plan opens no weights; give the sizes, by --preset or by their flags")

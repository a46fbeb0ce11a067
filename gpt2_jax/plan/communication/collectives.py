"""The collectives of a compiled program: what each device sends, and how often."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gpt2_jax.plan.communication.hlo import Computation, Instruction, Program, array_bytes, arrays, parse, trip_count
from gpt2_jax.plan.communication.replica_groups import Groups, replica_groups, source_target_pairs
from gpt2_jax.plan.errors import PlanError

SENT_BYTES: Mapping[str, Callable[[int, int], float]] = {
    "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
    "all-gather": lambda size, n: size * (n - 1),
    "reduce-scatter": lambda size, n: size * (n - 1) / n,
    "all-to-all": lambda size, n: size * (n - 1) / n,
    "collective-permute": lambda size, n: float(size),
}
"""Kind -> function from operand bytes and group size to the bytes that each device sends in a ring algorithm.

Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
"""

_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_REDUCE_SCATTER_PREFIX = "all-reduce-scatter"
"""Prefix of the computations in which libtpu writes a reduce-scatter as an all-reduce and a slice of its result."""
_CHAIN = re.compile(r'\bchain_id="')
"""Marks a collective that overlaps several fusions. Each of the fusions contains a copy of it."""
_CROSS_SLICE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
"""Marks a send that starts a collective between slices, which the hosts carry out."""
_CROSS_SLICE_KINDS = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
}


@dataclass(frozen=True)
class Collective:
    """One collective instruction of the program."""

    kind: str
    operands: tuple[str, ...]
    """Dtype and shape of each operand, such as `bf16[12,768]`."""
    groups: Groups
    """The devices that communicate with each other, or (sender, receiver) pairs for a collective-permute."""
    count: int
    """Executions per step."""
    op_name: str = ""
    """JAX's name for the operation, which includes the module."""

    @property
    def operand_bytes(self) -> int:
        return sum(array_bytes(operand) for operand in self.operands)

    @property
    def group_size(self) -> int:
        return max((len(group) for group in self.groups), default=1)

    @property
    def sent_bytes(self) -> float:
        """Bytes that each device sends per step."""
        if self.group_size == 1:
            return 0.0
        return self.count * SENT_BYTES[self.kind](self.operand_bytes, self.group_size)

    def crosses(self, slice_ids: Sequence[int]) -> bool:
        """Whether a group has devices in several slices. `slice_ids` has the slice of every device."""
        return any(len({slice_ids[device] for device in group}) > 1 for group in self.groups)


@dataclass(frozen=True)
class Collectives:
    """All collectives of a program."""

    instructions: tuple[Collective, ...]
    uncounted_loops: tuple[str, ...] = ()
    """Loops with collectives and an unknown number of iterations. They are counted once."""


def find_collectives(text: str, slice_ids: Sequence[int]) -> Collectives:
    """Find the collectives in a compiled program's HLO text.

    Args:
        slice_ids: the slice of every device, in the order of the mesh.

    Raises:
        PlanError: the text is not a program.
    """
    program = parse(text)
    if not program.entry:
        raise PlanError("the compiled program's text has no entry computation; this version of JAX is not supported")
    walk = _Walk(program, tuple(slice_ids))
    walk.visit(program.entry, 1, set())
    return Collectives(tuple(walk.found), tuple(dict.fromkeys(walk.uncounted_loops)))


@dataclass
class _Walk:
    """Visits the computations of a program in execution order and collects collectives."""

    program: Program
    slice_ids: tuple[int, ...]
    found: list[Collective] = field(default_factory=list)
    uncounted_loops: list[str] = field(default_factory=list)

    def visit(self, name: str, count: int, seen_channels: set[str]) -> None:
        """Visit a computation that runs `count` times per step.

        Args:
            seen_channels: channels of collectives that have copies in several fusions and were already found.
        """
        computation = self.program.computations.get(name, {})
        for instruction in computation.values():
            kind = instruction.operation.removesuffix("-start")
            if kind in SENT_BYTES or (kind == "send" and _CROSS_SLICE.search(instruction.attributes)):
                if kind == "all-reduce" and name.startswith(_REDUCE_SCATTER_PREFIX):
                    kind = "reduce-scatter"
                if not _is_repeated(instruction, seen_channels):
                    self.found.append(self._collective(kind, instruction, computation, count))
            elif kind == "while":
                self._visit_loop(instruction, computation, count)
            elif kind == "conditional":
                self._visit_conditional(instruction, count)
            else:
                for called in instruction.called_computations():
                    self.visit(called, count, seen_channels if kind == "fusion" else set())

    def _visit_loop(self, loop: Instruction, computation: Computation, count: int) -> None:
        trips, before = trip_count(self.program, loop, computation), len(self.found)
        for called in loop.called_computations():
            self.visit(called, count * (1 if trips is None else trips), set())
        if trips is None and len(self.found) > before:
            self.uncounted_loops.append(loop.name)

    def _visit_conditional(self, instruction: Instruction, count: int) -> None:
        """Count the branch that sends the most, because only one branch runs."""
        branches: list[list[Collective]] = [[]]
        for called in instruction.called_computations():
            branch = _Walk(self.program, self.slice_ids, uncounted_loops=self.uncounted_loops)
            branch.visit(called, count, set())
            branches.append(branch.found)
        self.found += max(branches, key=lambda branch: sum(collective.sent_bytes for collective in branch))

    def _collective(self, kind: str, instruction: Instruction, computation: Computation, count: int) -> Collective:
        shapes = [computation[name].shape for name in instruction.operands if name in computation]
        op_name = _OP_NAME.search(instruction.attributes)
        if (transfer := _CROSS_SLICE.search(instruction.attributes)) is not None:
            kind, groups = _CROSS_SLICE_KINDS.get(transfer[1], "collective-permute"), _groups_across(self.slice_ids)
        elif kind == "collective-permute":
            groups = source_target_pairs(instruction.attributes)
        else:
            groups = replica_groups(instruction.attributes, len(self.slice_ids))
        operands = tuple(array for shape in shapes for array in arrays(shape))
        return Collective(kind, operands, groups, count, op_name[1] if op_name else "")


def _is_repeated(instruction: Instruction, seen_channels: set[str]) -> bool:
    """Whether a copy of this collective was already found in another fusion."""
    channel = _CHANNEL.search(instruction.attributes)
    if channel is None or _CHAIN.search(instruction.attributes) is None:
        return False
    is_known = channel[1] in seen_channels
    seen_channels.add(channel[1])
    return is_known


def _groups_across(slice_ids: Sequence[int]) -> Groups:
    """Groups of the devices with the same index within their slice."""
    members: dict[int, list[int]] = {}
    for device, slice_id in enumerate(slice_ids):
        members.setdefault(slice_id, []).append(device)
    return tuple(zip(*members.values(), strict=True))

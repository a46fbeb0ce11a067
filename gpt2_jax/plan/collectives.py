"""What devices exchange in a compiled program: read from its text, each collective as often as it runs.

The text is XLA's (openxla.org/xla/operation_semantics). A computation is a block of instructions; `while` runs its
body over and over, and `fusion`, `call`, `conditional` and asynchronous starts have computations of their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gpt2_jax.plan.errors import PlanError

# Kind -> bytes that a device sends, of a group of n, by the bytes that it puts in: what an algorithm in a ring moves
# (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations").
SENT: Mapping[str, Callable[[int, int], float]] = {
    "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
    "all-gather": lambda size, n: size * (n - 1),
    "reduce-scatter": lambda size, n: size * (n - 1) / n,
    "all-to-all": lambda size, n: size * (n - 1) / n,
    "collective-permute": lambda size, n: float(size),
}

_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_COMMENT = re.compile(r"/\*.*?\*/")
_OPERATION = re.compile(r"\s*(?P<operation>[a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(?P<type>[a-z]+[a-z0-9]*)\[(?P<shape>[\d,<=]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_INDEX = re.compile(r"\bindex=(\d+)")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_SCATTERING = "all-reduce-scatter"
"""How the computations begin in which libtpu writes a reduce-scatter: an all-reduce, of which a slice is taken."""
_CHAINED = re.compile(r'\bchain_id="')
"""On a collective that runs beside several fusions, each of which has a copy of it."""
_ACROSS = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
"""On a send by which libtpu has a collective made across slices, by the hosts."""
_ACROSS_KINDS = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
}


@dataclass(frozen=True)
class Collective:
    """One instruction of the program."""

    kind: str
    operands: tuple[str, ...]
    """Dtype and shape of each array that a device puts in, as `bf16[12,768]`."""
    groups: tuple[tuple[int, ...], ...]
    """The devices that exchange with each other, by their place in the mesh; for a collective-permute, sender and
    receiver."""
    times: int
    """How often it runs in a step."""
    source: str = ""
    """Where in the model it is from, by JAX's name."""

    @property
    def operand_bytes(self) -> int:
        return sum(array_bytes(operand) for operand in self.operands)

    @property
    def group_size(self) -> int:
        return max((len(group) for group in self.groups), default=1)

    @property
    def sent_bytes(self) -> float:
        """By each device in a step."""
        return self.times * SENT[self.kind](self.operand_bytes, self.group_size) if self.group_size > 1 else 0.0

    def crosses(self, places: Sequence[int]) -> bool:
        """Whether any group has devices of several places, as slices are."""
        return any(len({places[device] for device in group}) > 1 for group in self.groups)


@dataclass(frozen=True)
class Exchange:
    """All collectives of a program."""

    collectives: tuple[Collective, ...]
    uncounted_loops: tuple[str, ...] = ()
    """Loops around collectives of which the text does not say how often they run; counted once."""


@dataclass(frozen=True)
class _Instruction:
    name: str
    operation: str
    shape: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool


@dataclass
class _Program:
    entry: str = ""
    computations: dict[str, dict[str, _Instruction]] = field(default_factory=dict)


def exchange(text: str, slices: Sequence[int]) -> Exchange:
    """What a program sends that runs on devices in these slices; raises `PlanError` for a text that cannot be read."""
    program = _parsed(text)
    if not program.entry:
        raise PlanError("the compiled program's text has no entry; this version of JAX writes it in another way")
    reading = _Reading(program, tuple(slices))
    reading.visit(program.entry, 1, set())
    return Exchange(tuple(reading.found), tuple(dict.fromkeys(reading.uncounted)))


def array_bytes(text: str) -> int:
    """Of all arrays that a shape's text names; what is no array of numbers has none."""
    return sum(
        _ceil_bytes(match["type"], math.prod(int(size.lstrip("<=")) for size in match["shape"].split(",") if size))
        for match in _ARRAY.finditer(text)
    )


def _ceil_bytes(kind: str, count: int) -> int:
    bits = 8 if kind == "pred" else int(found[1]) if (found := re.match(r"[a-z]+(\d+)", kind)) else 0
    return -(-bits * count // 8)


def _parsed(text: str) -> _Program:
    program, current = _Program(), None
    for line in text.splitlines():
        line = _COMMENT.sub("", line)
        if current is None:
            if (found := _COMPUTATION.match(line)) is not None:
                current = program.computations.setdefault(found["name"], {})
                program.entry = found["name"] if found["entry"] else program.entry
        elif line.rstrip() == "}":  # and not `}}, metadata=...`, with which a kernel's own description ends
            current = None
        elif (found := _INSTRUCTION.match(line)) is not None:
            if (instruction := _instruction(found)) is not None:
                current[instruction.name] = instruction
    return program


def _instruction(line: re.Match[str]) -> _Instruction | None:
    """Shape, operation, operands and attributes: `%name = SHAPE operation(OPERANDS), ATTRIBUTES`."""
    rest = line["rest"]
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
    found = _OPERATION.match(rest, end)
    if found is None:
        return None
    close = _closing(rest, found.end() - 1)
    arguments = rest[found.end() : close - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return _Instruction(
        line["name"], found["operation"], rest[:end], operands, arguments, rest[close:], bool(line["root"])
    )


def _closing(text: str, start: int) -> int:
    """Just after the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    return len(text)


@dataclass
class _Reading:
    """A walk through the program as it runs."""

    program: _Program
    slices: tuple[int, ...]
    found: list[Collective] = field(default_factory=list)
    uncounted: list[str] = field(default_factory=list)

    def visit(self, name: str, times: int, chained: set[str]) -> None:
        """A computation that runs so often; `chained` are the channels of collectives that have been seen of those
        that several fusions share."""
        computation = self.program.computations.get(name, {})
        for instruction in computation.values():
            kind = instruction.operation.removesuffix("-start")
            if kind in SENT or (kind == "send" and _ACROSS.search(instruction.attributes)):
                if kind == "all-reduce" and name.startswith(_SCATTERING):
                    kind = "reduce-scatter"
                if not _seen(instruction, chained):
                    self.found.append(self._collective(kind, instruction, computation, times))
            elif kind == "while":
                self._loop(instruction, computation, times)
            elif kind == "conditional":
                self._costliest(instruction, times)
            else:
                for called in _called(instruction):
                    self.visit(called, times, chained if kind == "fusion" else set())

    def _loop(self, loop: _Instruction, computation: Mapping[str, _Instruction], times: int) -> None:
        trips, before = _trips(self.program, loop, computation), len(self.found)
        for called in _called(loop):
            self.visit(called, times * (1 if trips is None else trips), set())
        if trips is None and len(self.found) > before:
            self.uncounted.append(loop.name)

    def _costliest(self, instruction: _Instruction, times: int) -> None:
        """Of a conditional's branches, of which one runs, the one that sends the most."""
        branches: list[list[Collective]] = [[]]
        for called in _called(instruction):
            branch = _Reading(self.program, self.slices, uncounted=self.uncounted)
            branch.visit(called, times, set())
            branches.append(branch.found)
        self.found += max(branches, key=lambda branch: sum(one.sent_bytes for one in branch))

    def _collective(
        self, kind: str, instruction: _Instruction, computation: Mapping[str, _Instruction], times: int
    ) -> Collective:
        shapes = [computation[name].shape for name in instruction.operands if name in computation]
        arrays = [match for shape in shapes for match in _ARRAY.finditer(shape) if match["type"] != "token"]
        source = _SOURCE.search(instruction.attributes)
        if (across := _ACROSS.search(instruction.attributes)) is not None:
            kind, groups = _ACROSS_KINDS.get(across[1], "collective-permute"), _across(self.slices)
        else:
            groups = _groups(kind, instruction.attributes, len(self.slices))
        operands = tuple(f"{match['type']}[{match['shape']}]" for match in arrays)
        return Collective(kind, operands, groups, times, source[1] if source else "")


def _seen(instruction: _Instruction, chained: set[str]) -> bool:
    channel = _CHANNEL.search(instruction.attributes)
    if channel is None or _CHAINED.search(instruction.attributes) is None:
        return False
    known = channel[1] in chained
    chained.add(channel[1])
    return known


def _across(slices: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Devices at the same place of each slice."""
    members: dict[int, list[int]] = {}
    for device, place in enumerate(slices):
        members.setdefault(place, []).append(device)
    return tuple(zip(*members.values(), strict=True))


def _called(instruction: _Instruction) -> Iterator[str]:
    yield from _CALLED.findall(instruction.attributes)
    for names in _BRANCHES.findall(instruction.attributes):
        yield from (name.strip().lstrip("%") for name in names.split(","))


def _trips(program: _Program, loop: _Instruction, computation: Mapping[str, _Instruction]) -> int | None:
    """How often a loop runs: as the compiler says, or by its condition, `counter < constant`, and by what the counter
    begins with and is added to; rings around a matrix product count by two."""
    if (known := _TRIPS.search(loop.attributes)) is not None:
        return int(known[1])
    names = (re.search(rf"\b{part}=%?([\w.\-]+)", loop.attributes) for part in ("condition", "body"))
    condition, body = (program.computations.get(name[1], {}) if name else {} for name in names)
    test = _root(condition)
    if test is None or test.operation != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, limit = (_resolved(condition, operand) for operand in test.operands)
    end = _constant(limit)
    if counter is None or (found := _INDEX.search(counter.attributes)) is None or end is None:
        return None
    place, last = int(found[1]), _root(body)
    step = None if last is None else _step(body, _element(body, last.name, place))
    begin = _constant(_element(computation, loop.operands[0], place))
    if step is None or begin is None:
        return None
    return max(0, -(-(end - begin) // step))


def _root(computation: Mapping[str, _Instruction]) -> _Instruction | None:
    return next((instruction for instruction in computation.values() if instruction.is_root), None)


def _step(body: Mapping[str, _Instruction], counter: _Instruction | None) -> int | None:
    """What a loop adds to its counter."""
    if counter is None or counter.operation != "add":
        return None
    added = [_constant(_resolved(body, operand)) for operand in counter.operands]
    return next((number for number in added if number), None)


def _element(computation: Mapping[str, _Instruction], name: str, place: int) -> _Instruction | None:
    """What is at a place of a tuple."""
    made = _resolved(computation, name)
    if made is None or made.operation != "tuple" or place >= len(made.operands):
        return None
    return _resolved(computation, made.operands[place])


def _resolved(computation: Mapping[str, _Instruction], name: str) -> _Instruction | None:
    """The instruction that gave a value, past copies of it."""
    found = computation.get(name)
    while found is not None and found.operation in ("copy", "bitcast", "copy-done", "copy-start") and found.operands:
        found = computation.get(found.operands[0])
    return found


def _constant(instruction: _Instruction | None) -> int | None:
    if instruction is None or instruction.operation != "constant":
        return None
    return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments) else None


def _groups(kind: str, attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The four ways in which XLA writes them."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{([{}\d,\s]*)\}", attributes)
        found = re.findall(r"\{(\d+),(\d+)\}", pairs[1]) if pairs else []
        return tuple((int(source), int(target)) for source, target in found if source != target)
    if (listed := re.search(r"replica_groups=\{(\{[\d,{}\s]*\})\}", attributes)) is not None:
        groups = [tuple(int(i) for i in g.split(",") if i) for g in re.findall(r"\{([\d,]*)\}", listed[1])]
        return tuple(groups)
    if (iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)) is not None:
        return _rows(_iota(iota[3]).reshape(int(iota[1]), int(iota[2])))
    if (mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\s*\{([^}]*)\}", attributes)) is not None:
        return _groups_of_mesh(mesh[1], mesh[2], mesh[3])
    return (tuple(range(devices)),)


def _groups_of_mesh(axes: str, order: str, over: str) -> tuple[tuple[int, ...], ...]:
    """`mesh['a'=4,'b'=2], device_ids=(...) {'a'}`: along these axes of a mesh; of an axis `'a':(2)4`, along the part
    of size 4 that comes after the part of size 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    shape: list[int] = []
    wanted: list[int] = []
    parts = {name: (int(pre), int(size)) for name, pre, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", over)}
    for name, size in sizes.items():
        before, own = parts.get(name, (1, size))
        split = (before, own, size // (before * own))
        if re.search(rf"'{re.escape(name)}'", over):
            wanted.append(len(shape) + 1)
        shape += split
    ids = np.arange(math.prod(sizes.values()))
    if (iota := re.search(r"device_ids=\((\[[\d,]+\](?:<=\[[\d,]+\])?(?:T\([\d,]+\))?)\)", order)) is not None:
        ids = _iota(iota[1].split("<=")[-1])
    elif (listed := re.search(r"device_ids=\(([\d,\s]+)\)", order)) is not None:
        ids = np.array([int(i) for i in listed[1].split(",")])
    rest = [axis for axis in range(len(shape)) if axis not in wanted]
    grid = ids.reshape(shape).transpose(*rest, *wanted)
    return _rows(grid.reshape(-1, math.prod(shape[axis] for axis in wanted)))


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: 0, 1, 2 ... in this shape, its axes in this order."""
    shape, _, order = text.partition("T")
    grid = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return (grid.transpose(_numbers(order)) if order else grid).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _rows(grid: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(i) for i in row) for row in grid)

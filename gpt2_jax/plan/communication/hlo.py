"""Parser of compiled programs in HLO text (openxla.org/xla/operation_semantics).

A program consists of computations, and a computation of instructions of the form
`%name = SHAPE operation(OPERANDS), ATTRIBUTES`. The attributes of `while`, `fusion`, `call`, `conditional` and of
asynchronous starts name the computations that they run.

XLA has no public Python parser for this text, and its cost analysis does not report collectives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_COMMENT = re.compile(r"/\*.*?\*/")
_OPERATION = re.compile(r"\s*(?P<operation>[a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(?P<type>[a-z]+[a-z0-9]*)\[(?P<shape>[\d,<=]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_INDEX = re.compile(r"\bindex=(\d+)")


@dataclass(frozen=True)
class Instruction:
    """One instruction. All fields except `operands` and `is_root` are text as in the program."""

    name: str
    operation: str
    shape: str
    operands: tuple[str, ...]
    """Names of the instructions whose results it takes."""
    arguments: str
    """The text between the parentheses."""
    attributes: str
    is_root: bool

    def called_computations(self) -> Iterator[str]:
        """Names of the computations that this instruction runs."""
        yield from _CALLED.findall(self.attributes)
        for names in _BRANCHES.findall(self.attributes):
            yield from (name.strip().lstrip("%") for name in names.split(","))


Computation = Mapping[str, Instruction]
"""Name -> instruction, in the order of the program."""


@dataclass
class Program:
    entry: str = ""
    """Name of the computation that runs first. Empty if the text is not a program."""
    computations: dict[str, dict[str, Instruction]] = field(default_factory=dict)


def parse(text: str) -> Program:
    """Parse a program. Lines that are not understood are skipped."""
    program, current = Program(), None
    for line in text.splitlines():
        line = _COMMENT.sub("", line)
        if current is None:
            if (found := _COMPUTATION.match(line)) is not None:
                current = program.computations.setdefault(found["name"], {})
                program.entry = found["name"] if found["entry"] else program.entry
        elif line.rstrip() == "}":  # not `}}, metadata=...`, the last line of a kernel's description
            current = None
        elif (found := _INSTRUCTION.match(line)) is not None:
            if (instruction := _parse_instruction(found)) is not None:
                current[instruction.name] = instruction
    return program


def _parse_instruction(line: re.Match[str]) -> Instruction | None:
    rest = line["rest"]
    end = _after_closing_parenthesis(rest, 0) if rest.startswith("(") else rest.find(" ")
    found = _OPERATION.match(rest, end)
    if found is None:
        return None
    close = _after_closing_parenthesis(rest, found.end() - 1)
    arguments = rest[found.end() : close - 1]
    return Instruction(
        name=line["name"],
        operation=found["operation"],
        shape=rest[:end],
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments=arguments,
        attributes=rest[close:],
        is_root=bool(line["root"]),
    )


def _after_closing_parenthesis(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position + 1
    return len(text)


def arrays(shape: str) -> list[str]:
    """The arrays in a shape's text, without layouts. Tokens are not arrays.

    >>> arrays("(f32[8,6]{1,0}, bf16[3]{0}, token[])")
    ['f32[8,6]', 'bf16[3]']
    """
    return [f"{match['type']}[{match['shape']}]" for match in _ARRAY.finditer(shape) if match["type"] != "token"]


def array_bytes(shape: str) -> int:
    """Total size of the arrays in a shape's text.

    >>> array_bytes("(f32[8,6]{1,0}, pred[5])")
    197
    """
    return sum(
        _bytes_of(match["type"], math.prod(int(size.lstrip("<=")) for size in match["shape"].split(",") if size))
        for match in _ARRAY.finditer(shape)
    )


def _bytes_of(dtype: str, count: int) -> int:
    bits = 8 if dtype == "pred" else int(found[1]) if (found := re.match(r"[a-z]+(\d+)", dtype)) else 0
    return -(-bits * count // 8)


def trip_count(program: Program, loop: Instruction, computation: Computation) -> int | None:
    """Number of iterations of a `while` instruction in `computation`, or None if it is unknown.

    XLA annotates some loops with it. For others, it is derived from a condition `counter < constant`, a constant start
    and a constant increment. Loops around a matrix product in a ring have an increment of 2.
    """
    if (known := _TRIP_COUNT.search(loop.attributes)) is not None:
        return int(known[1])
    names = (re.search(rf"\b{part}=%?([\w.\-]+)", loop.attributes) for part in ("condition", "body"))
    condition, body = (program.computations.get(name[1], {}) if name else {} for name in names)
    test = _root(condition)
    if test is None or test.operation != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, limit = (_resolve(condition, operand) for operand in test.operands)
    end = _constant(limit)
    if counter is None or (found := _INDEX.search(counter.attributes)) is None or end is None:
        return None
    index, result = int(found[1]), _root(body)
    step = None if result is None else _increment(body, _tuple_element(body, result.name, index))
    begin = _constant(_tuple_element(computation, loop.operands[0], index))
    if step is None or begin is None:
        return None
    return max(0, -(-(end - begin) // step))


def _root(computation: Computation) -> Instruction | None:
    return next((instruction for instruction in computation.values() if instruction.is_root), None)


def _increment(body: Computation, counter: Instruction | None) -> int | None:
    """The constant that a loop's body adds to its counter."""
    if counter is None or counter.operation != "add":
        return None
    addends = [_constant(_resolve(body, operand)) for operand in counter.operands]
    return next((number for number in addends if number), None)


def _tuple_element(computation: Computation, name: str, index: int) -> Instruction | None:
    parent = _resolve(computation, name)
    if parent is None or parent.operation != "tuple" or index >= len(parent.operands):
        return None
    return _resolve(computation, parent.operands[index])


def _resolve(computation: Computation, name: str) -> Instruction | None:
    """The instruction that computed a value. Copies of the value are skipped."""
    found = computation.get(name)
    while found is not None and found.operation in ("copy", "bitcast", "copy-done", "copy-start") and found.operands:
        found = computation.get(found.operands[0])
    return found


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.operation != "constant":
        return None
    return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments) else None

"""A symbolic pickle reader: an interpreter for the opcodes that torch writes. It imports and calls nothing.

Python's unpickler imports and calls every name in a pickle. Here each name is looked up in a table that the caller
provides, and only functions of that table are called. Any other name, and every opcode that creates objects in another
way, is refused. The interpreter does not recurse, and its cost is bounded by the limits below.

Opcodes: https://docs.python.org/3/library/pickletools.html
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bridge.errors import CheckpointError, quoted

# GPT-2 XL with AdamW's state, 2,400 tensors, is 0.4 MB and 80,000 opcodes, which push 10,000 values.
MOST_BYTES = 2**22
MOST_OPCODES = 2**19
MOST_VALUES = 2**18
"""Limit on the values in the result. A value that is referenced several times counts each time."""
MOST_DEPTH = 32
MOST_STRING_BYTES = 2**16
MOST_CHARACTERS = 2**22
"""Limit on the characters of all strings in the result, counted in the same way."""
MOST_KEY = 2**16
"""Limit on integer keys of a dict (AdamW numbers its parameters). Larger keys could be chosen to have equal hashes."""
_MOST_NAME_BYTES = 256
_PROTOCOLS = range(2, 6)


@dataclass(frozen=True)
class Symbol:
    """The meaning of a name in a pickle."""

    name: str
    call: Callable[[tuple[Any, ...]], Any] | None = None
    """Called with the arguments when the pickle calls the name. None if the name may not be called."""
    value: Any = None


def load(
    content: bytes,
    where: str,
    *,
    symbols: Mapping[tuple[str, str], Symbol],
    persistent: Callable[[Any], Any],
    leaves: tuple[type, ...],
) -> Any:
    """Return the content of a pickle: dicts, lists, tuples, strings, numbers, bools, None, and `leaves`.

    Args:
        where: the name of the pickle for messages.
        symbols: (module, name) -> its meaning. Every other name is an error.
        persistent: a function from a persistent id to its value.
        leaves: the types of the values that `persistent` and the calls return.

    Raises `CheckpointError` for any other content, and if a limit is exceeded.
    """
    if len(content) > MOST_BYTES:
        raise CheckpointError(f"{where} has {len(content)} bytes; the limit is {MOST_BYTES}")
    machine = _Machine(content, where, symbols, persistent)
    result = machine.run()
    _require_plain(result, where, leaves)
    return result


class _Machine:
    """A pickle's stack, marks and memo."""

    def __init__(
        self,
        content: bytes,
        where: str,
        symbols: Mapping[tuple[str, str], Symbol],
        persistent: Callable[[Any], Any],
    ) -> None:
        self.content = content
        self.where = where
        self.symbols = symbols
        self.persistent = persistent
        self.position = 0
        self.stack: list[Any] = []
        self.below_marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        if self.take(1) != b"\x80" or self.take(1)[0] not in _PROTOCOLS:
            raise self.refused(f"is not a pickle of protocol {_PROTOCOLS[0]} to {_PROTOCOLS[-1]}")
        opcodes = 0
        while (code := self.take(1)) != b".":
            opcodes += 1
            if opcodes > MOST_OPCODES:
                raise self.refused(f"has more than {MOST_OPCODES} opcodes")
            _OPCODES.get(code, _unknown)(self)
        return self.finished()

    def finished(self) -> Any:
        result = self.pop()
        if self.stack or self.below_marks:
            raise self.refused("ends inside an unfinished value")
        if trailing := len(self.content) - self.position:
            raise self.refused(f"has {trailing} bytes after its end")
        return result

    def refused(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.where} {why}")

    def take(self, count: int) -> bytes:
        taken = self.content[self.position : self.position + count]
        if len(taken) != count:
            raise self.refused("is truncated")
        self.position += count
        return taken

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        end = self.content.find(b"\n", self.position, self.position + _MOST_NAME_BYTES)
        if end < 0:
            raise self.refused(f"has a name that does not end, or is longer than {_MOST_NAME_BYTES} bytes")
        line = self.text(end - self.position)
        self.position += 1
        return line

    def text(self, count: int) -> str:
        if count > MOST_STRING_BYTES:
            raise self.refused(f"has a string of {count} bytes; the limit is {MOST_STRING_BYTES}")
        try:
            return self.take(count).decode()
        except UnicodeDecodeError:
            raise self.refused("has a string that is not UTF-8") from None

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, kind: type | None = None) -> Any:
        self.top(kind)
        return self.stack.pop()

    def top(self, kind: type | None = None) -> Any:
        if not self.stack:
            raise self.refused("pops from an empty stack")
        if kind is not None and type(self.stack[-1]) is not kind:
            raise self.refused(f"has {_what(self.stack[-1])} instead of a {kind.__name__.lower()}")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        if not self.below_marks:
            raise self.refused("refers to a mark that it has not set")
        items, self.stack = self.stack, self.below_marks.pop()
        return items

    def resolve(self, module: str, name: str) -> Symbol:
        if (module, name) not in self.symbols:
            raise self.refused(
                f"refers to {quoted(f'{module}.{name}')}; only tensor types are allowed. No code was executed. If you "
                "trust the file, load it with torch and save only its tensors"
            )
        return self.symbols[module, name]


def _unknown(m: _Machine) -> None:
    code = m.content[m.position - 1]
    raise m.refused(f"has the opcode {_MAKE_OBJECTS.get(code, hex(code))}, which torch does not write for tensors")


def _instance(m: _Machine) -> None:
    m.resolve(m.line(), m.line())
    raise m.refused("has the opcode INST, which torch does not write for tensors")


def _frame(m: _Machine) -> None:
    if m.number(8) > len(m.content) - m.position:
        raise m.refused("is truncated")


def _mark(m: _Machine) -> None:
    m.below_marks.append(m.stack)
    m.stack = []


def _tuple(m: _Machine) -> None:
    items = tuple(m.pop_to_mark())
    m.push(items)


def _tuple_of(m: _Machine, count: int) -> None:
    items = [m.pop() for _ in range(count)]
    m.push(tuple(reversed(items)))


def _append(m: _Machine) -> None:
    item = m.pop()
    m.top(list).append(item)


def _appends(m: _Machine) -> None:
    items = m.pop_to_mark()
    m.top(list).extend(items)


def _set_item(m: _Machine) -> None:
    value, key = m.pop(), m.pop()
    _set_items(m, [key, value])


def _set_items(m: _Machine, items: list[Any]) -> None:
    if len(items) % 2:
        raise m.refused("has a key without a value")
    target = m.top(dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not (type(key) is str or (type(key) is int and 0 <= key < MOST_KEY)):
            raise m.refused(f"has {_what(key)} as a key; keys are strings, or numbers below {MOST_KEY}")
        if key in target:
            raise m.refused(f"has the key {quoted(key)} twice")
        target[key] = value


def _put(m: _Machine, index: int) -> None:
    if index >= MOST_OPCODES:
        raise m.refused(f"uses the memo index {index}; the largest is {MOST_OPCODES - 1}")
    m.memo[index] = m.top()


def _get(m: _Machine, index: int) -> None:
    if index not in m.memo:
        raise m.refused(f"reads the memo index {index}, which is not set")
    m.push(m.memo[index])


def _global_of_stack(m: _Machine) -> None:
    name, module = m.pop(str), m.pop(str)
    m.push(m.resolve(module, name))


def _persistent(m: _Machine) -> None:
    m.push(m.persistent(m.pop()))


def _reduce(m: _Machine) -> None:
    arguments, symbol = m.pop(tuple), m.pop(Symbol)
    if symbol.call is None:
        raise m.refused(f"calls {symbol.name}, which is not a function")
    m.push(symbol.call(arguments))


def _build(m: _Machine) -> None:
    """Accept and discard the attribute `_metadata` of a state_dict, which holds the versions of its modules."""
    attributes = m.pop(dict)
    m.top(dict)
    for name in attributes:
        if name != "_metadata":
            raise m.refused(f"sets the attribute {quoted(name)}")


_OPCODES: Mapping[bytes, Callable[[_Machine], None]] = {
    b"\x95": _frame,
    b"(": _mark,
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number(1)),
    b"M": lambda m: m.push(m.number(2)),
    b"J": lambda m: m.push(int.from_bytes(m.take(4), "little", signed=True)),
    b"\x8a": lambda m: m.push(int.from_bytes(m.take(m.number(1)), "little", signed=True)),
    b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    b"X": lambda m: m.push(m.text(m.number(4))),
    b"\x8c": lambda m: m.push(m.text(m.number(1))),
    b")": lambda m: m.push(()),
    b"\x85": lambda m: _tuple_of(m, 1),
    b"\x86": lambda m: _tuple_of(m, 2),
    b"\x87": lambda m: _tuple_of(m, 3),
    b"t": _tuple,
    b"]": lambda m: m.push([]),
    b"a": _append,
    b"e": _appends,
    b"}": lambda m: m.push({}),
    b"s": _set_item,
    b"u": lambda m: _set_items(m, m.pop_to_mark()),
    b"q": lambda m: _put(m, m.number(1)),
    b"r": lambda m: _put(m, m.number(4)),
    b"\x94": lambda m: _put(m, len(m.memo)),
    b"h": lambda m: _get(m, m.number(1)),
    b"j": lambda m: _get(m, m.number(4)),
    b"c": lambda m: m.push(m.resolve(m.line(), m.line())),
    b"\x93": _global_of_stack,
    b"i": _instance,
    b"Q": _persistent,
    b"R": _reduce,
    b"b": _build,
}
_MAKE_OBJECTS = {ord("o"): "OBJ", 0x81: "NEWOBJ", 0x92: "NEWOBJ_EX", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4"}


def _require_plain(result: Any, where: str, leaves: tuple[type, ...]) -> None:
    """Raise `CheckpointError` unless the result is a tree of plain values within the limits.

    Shared values count each time they are referenced: nested sharing can make a small pickle exponentially large for
    code that walks the tree.
    """
    waiting = [(result, 0)]
    values = characters = 0
    while waiting:
        item, depth = waiting.pop()
        kind = type(item)
        if kind is str:
            characters += len(item)
        elif kind in (dict, list, tuple):
            inner = [*item, *item.values()] if kind is dict else item
            values += len(inner)
            if depth == MOST_DEPTH or values > MOST_VALUES:
                raise CheckpointError(
                    f"{where} nests its values deeper than {MOST_DEPTH} or holds more than {MOST_VALUES} values"
                )
            waiting += [(value, depth + 1) for value in inner]
        elif not (item is None or kind in (bool, int, float, *leaves)):
            raise CheckpointError(f"{where} holds {_what(item)}, which is neither a tensor nor a plain value")
        if characters > MOST_CHARACTERS:
            raise CheckpointError(f"{where} holds more than {MOST_CHARACTERS} characters")


def _what(value: Any) -> str:
    return value.name if isinstance(value, Symbol) else f"a {type(value).__name__}"

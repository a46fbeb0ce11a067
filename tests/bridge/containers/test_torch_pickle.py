"""The pickle reader against Python's unpickler, and its limits."""

from __future__ import annotations

import io
import math
import pickle
import random
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from support.refusals import MOST_BYTES, MOST_SECONDS
from support.torch_archives import integer, text

from bridge import CheckpointError
from bridge.containers import torch_pickle as pickles
from bridge.containers.torch_pickle import Symbol, load

SYMBOLS = {("collections", "OrderedDict"): Symbol("collections.OrderedDict", call=lambda arguments: {})}


def read(content: bytes) -> Any:
    return load(content, "f: data.pkl", symbols=SYMBOLS, persistent=lambda key: key, leaves=())


class Forbidding(pickle.Unpickler):
    """Python's unpickler, which refuses every global."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return pid


def alike(found: Any, expected: Any) -> bool:
    """Return whether the values and their types are equal at every depth. NaN equals NaN."""
    if type(found) is not type(expected):
        return False
    if isinstance(found, dict):
        return alike(list(found.items()), list(expected.items()))
    if isinstance(found, list | tuple):
        return len(found) == len(expected) and all(map(alike, found, expected))
    return found == expected or (isinstance(found, float) and math.isnan(found) and math.isnan(expected))


def random_value(rng: random.Random, depth: int = 0) -> Any:
    number = rng.choice((rng.randrange(300), rng.randrange(-(2**40), 2**70), -1, 2**31, -(2**31), 2**2000))
    string = "".join(rng.choice("aé€😀\n\0") for _ in range(rng.choice((0, 3, 300))))
    plain = (number, string, rng.random() * 1e300, float("inf"), float("nan"), True, False, None)
    if depth == 4 or rng.random() < 0.3:
        return rng.choice(plain)
    inner = [random_value(rng, depth + 1) for _ in range(rng.choice((0, 1, 2, 3, 4, 7)))]
    if rng.random() < 0.3:
        inner += inner  # shared objects are stored in the memo
    keys = [f"key {i}" if rng.random() < 0.5 else i for i in range(len(inner))]
    return rng.choice((inner, tuple(inner), dict(zip(keys, inner, strict=True))))


# Compared with Python's unpickler


@pytest.mark.sampled(3)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("make", [pickle.dumps, pickle._dumps], ids=["C", "Python"])  # type: ignore[attr-defined]
def test_plain_values_survive_a_round_trip(protocol: int, make: Callable[..., bytes]) -> None:
    for seed in range(150):
        value = random_value(random.Random(seed))
        assert alike(read(make(value, protocol)), value), seed


def test_every_truncation_is_refused() -> None:
    for protocol in (2, 4):
        content = pickle.dumps({"a": [1, 2.5, "x", (None, True, 2**70)], "b": {3: ("y",) * 5}}, protocol)
        for length in range(len(content)):
            with pytest.raises(CheckpointError, match=r"f: data\.pkl"):
                read(content[:length])


@pytest.mark.thorough
def test_a_damaged_pickle_is_refused_or_read_as_python_reads_it() -> None:
    loaded = 0
    for seed in range(3_000):
        rng = random.Random(seed)
        content = bytearray(pickle.dumps(random_value(rng), rng.choice((2, 3, 4, 5))))
        for _ in range(rng.choice((1, 1, 2, 3))):
            at = rng.randrange(len(content))
            content[at : at + rng.choice((0, 1, 1))] = bytes([rng.choice((rng.randrange(256), *b"(}]u.t0Qab\x94\x85"))])
        try:
            found = read(bytes(content))
        except CheckpointError:
            continue
        try:
            expected = Forbidding(io.BytesIO(content)).load()
        except pickle.UnpicklingError:  # a frame of the wrong length, which our reader ignores
            continue
        assert alike(found, expected), seed
        loaded += 1
    assert loaded > 150


@pytest.mark.parametrize("code", range(256))
def test_every_opcode_without_operands_is_refused_or_read_as_python_reads_it(code: int) -> None:
    for tail in (b"", b".", bytes(300) + b".", b"\n\n.", b"\xff" * 9 + b"."):
        for before in (b"", b"(", b"N", b"}", b")", b"(NN", b"]" * 3):
            content = b"\x80\x02" + before + bytes([code]) + tail
            try:
                found = read(content)
            except CheckpointError:
                continue
            assert alike(found, Forbidding(io.BytesIO(content)).load())


# Limits on time and memory


def memo_of_lists(width: int, depth: int) -> bytes:
    """Return nested lists, each with `width` references to the previous one: `width ** depth` values when expanded."""
    level = b"]q\1(" + b"h\0" * width + b"eq\0"
    return b"\x80\x02(]q\0" + level * depth + b"t."


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "lists of lists": (lambda: memo_of_lists(10, 30), "holds more than 262144"),
    "wide lists of wide lists": (lambda: memo_of_lists(100_000, 2), "holds more than 262144"),
    "tuples of tuples": (lambda: b"\x80\x02N" + b"q\0h\0\x86" * 60 + b".", "nests its values deeper than 32"),
    "one long string everywhere": (
        lambda: b"\x80\x02(" + text("x" * 65_535) + b"q\0" + b"h\0" * 100_000 + b"t.",
        "more than 4194304 characters",
    ),
    "a dict of itself": (lambda: b"\x80\x02}q\0" + text("a") + b"h\0s.", "nests its values deeper"),
    "dicts": (lambda: b"\x80\x02(" + b"}" * 600_000 + b"t.", "more than 524288 opcodes"),
    "dicts in the memo": (lambda: b"\x80\x04(" + b"}\x94" * 260_000, "is truncated"),
    "dicts with a key": (lambda: b"\x80\x02(" + b"}K\0Ns" * 131_000, "is truncated"),
    "wide strings": (lambda: b"\x80\x04(" + b"\x8c\4\xf0\x9f\x98\x80" * 520_000, "is truncated"),
    "long numbers": (lambda: b"\x80\x02(" + (b"\x8a\xff" + b"\x7f" * 255) * 16_000, "is truncated"),
    "marks": (lambda: b"\x80\x02" + b"(" * 520_000, "is truncated"),
    "tuples of one": (lambda: b"\x80\x02(" + b"N\x85" * 260_000, "is truncated"),
    "numbers that collide": (
        lambda: b"\x80\x02}(" + b"".join(integer(k << 16) + b"N" for k in range(1, 30_000)) + b"u.",
        "as a key; keys are strings, or numbers below 65536",
    ),
    "attributes set repeatedly": (
        lambda: b"\x80\x02}}(" + b"".join(text(str(k)) + b"N" for k in range(50_000)) + b"uq\0" + b"bh\0" * 50_000,
        "sets the attribute",
    ),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("make", "message"), BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_within_the_budget(make: Callable[[], bytes], message: str) -> None:
    content = make()
    assert len(content) <= pickles.MOST_BYTES, "the content is refused, not the size"
    began = time.process_time()
    with pytest.raises(CheckpointError, match=message):
        read(content)
    assert time.process_time() - began < MOST_SECONDS
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read(content)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


def test_the_largest_gpt2_needs_less_than_a_tenth_of_the_limit() -> None:
    """The names, shapes and AdamW state of 580 parameters, with about as many opcodes as torch writes."""
    described = ("storage", "FloatStorage", "0", "cpu", 2_560_000, 0, (1600, 1600), (1600, 1), False, {})
    state = {
        "model": {f"transformer.h.{k}.attn.c_attn.weight": (*described, k) for k in range(580)},
        "optimizer": {"state": {k: {m: (*described, k, m) for m in ("step", "a", "b")} for k in range(580)}},
    }
    content = pickle.dumps(state, 2)
    assert alike(read(content), state)
    assert len(content) < pickles.MOST_BYTES / 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02" + text("x" * 65_537) + b".", "a string of 65537 bytes; the limit is 65536"),
        (b"\x80\x02]r\x00\x00\x08\x00.", "uses the memo index 524288; the largest is 524287"),
        (b"\x80\x02" + b"]" * 33 + b"a" * 32 + b".", "deeper than 32"),
        (b"\x80\x02}" + integer(65_536) + b"Ns.", "a int as a key"),
        (b"\x80\x02}" + integer(-1) + b"Ns.", "a int as a key"),
        (b"\x80\x02}\x88Ns.", "a bool as a key"),
        (b"\x80\x02}NNs.", "a NoneType as a key"),
        (b"\x80\x02})Ns.", "a tuple as a key"),
        (b"\x80\x02" + b"N" * (2**22), "has 4194306 bytes; the limit is 4194304"),
    ],
    ids=["string", "memo", "depth", "number", "negative", "bool", "none", "tuple", "bytes"],
)
def test_one_more_than_a_limit_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(content)


def test_values_at_the_limits_are_read() -> None:
    assert read(b"\x80\x02" + text("x" * 65_536) + b".") == "x" * 65_536
    assert read(b"\x80\x02]r\xff\xff\x07\x00.") == []
    assert alike(read(b"\x80\x02" + b"]" * 32 + b"a" * 31 + b"."), eval("[" * 32 + "]" * 32))
    assert read(b"\x80\x02}" + integer(65_535) + b"Ns.") == {65_535: None}

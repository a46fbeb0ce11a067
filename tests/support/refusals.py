"""Assert that invalid input raises an error of this project, within a budget of time and memory, and leaves no files.

The tests of every reader call `assert_refused` for each invalid input.
"""

from __future__ import annotations

import resource
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.commands import run

import bridge
from bridge import BridgeError

MOST_BYTES = 64 * 2**20
"""Memory limit for rejecting a checkpoint, in addition to that of the idle process."""
MOST_SECONDS = 2.0
"""Limit of processor time, which does not depend on the load of the machine."""


@contextmanager
def within_budget() -> Iterator[None]:
    """Assert that the block takes at most `MOST_SECONDS` of processor time and `MOST_BYTES` of memory.

    Counts Python's allocations, and the growth of the process's peak memory, which includes native code.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    started = time.process_time()
    try:
        yield
        assert time.process_time() - started < MOST_SECONDS
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) < MOST_BYTES


def open_and_read(source: Path, base: Path | None = None) -> str:
    """Open a checkpoint and read all of it."""
    return bridge.fingerprint(bridge.load(source, base=base).tensors)


def assert_refused(
    source: Path,
    expected: str,
    capsys: pytest.CaptureFixture[str],
    error: type[BridgeError] = BridgeError,
    base: Path | None = None,
) -> None:
    """Assert that opening or reading `source` raises `error` within the budget.

    The message must have `expected` and the name of the source. `gpt2 convert` must print it, exit with 2 and leave
    no files.

    Args:
        base: for an adapter, the model that it changes.
    """
    started = time.process_time()
    with pytest.raises(error) as caught:
        open_and_read(source, base)
    seconds = time.process_time() - started
    message = str(caught.value)
    assert expected in message
    assert source.name in message, "the message names the file"
    assert message.replace("\n", "").isprintable(), "control characters are escaped"
    assert len(message) < 4000 + len(str(source)), "untrusted text is truncated"
    assert seconds < MOST_SECONDS

    tracemalloc.start()
    try:
        with pytest.raises(error):
            open_and_read(source, base)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()

    there = sorted(source.parent.iterdir())
    capsys.readouterr()
    flags = () if base is None else ("--base", base)
    assert run("convert", source, source.parent / "converted", "--to", "flax", *flags) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("gpt2: ")
    assert "Traceback" not in printed.err
    assert expected in printed.err
    assert sorted(source.parent.iterdir()) == there, "nothing is left behind"

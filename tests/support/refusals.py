"""What every bad input gets: an error of this project's, soon, in little memory, and nothing left behind.

`assert_refused` is for each case of a reader's list of bad inputs: the same questions of every one.
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
"""What refusing a checkpoint may take over the idle process."""
MOST_SECONDS = 2.0
"""Of this process's processor time, which a busy machine does not stretch."""


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
    """Opens a checkpoint and reads all of it."""
    return bridge.fingerprint(bridge.load(source, base=base).tensors)


def assert_refused(
    source: Path,
    says: str,
    capsys: pytest.CaptureFixture[str],
    error: type[BridgeError] = BridgeError,
    base: Path | None = None,
) -> None:
    """Opening or reading `source` raises `error` with `says` and the source's name in its message, within the
    budget; `gpt2 convert` ends with exit code 2, says the same, and leaves nothing.

    `base`: for an adapter, the model that it changes.
    """
    started = time.process_time()
    with pytest.raises(error) as caught:
        open_and_read(source, base)
    seconds = time.process_time() - started
    message = str(caught.value)
    assert says in message
    assert source.name in message, "the message names the file"
    assert message.replace("\n", "").isprintable(), "control characters are escaped"
    assert len(message) < 4000 + len(str(source)), "untrusted text is cut"
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
    assert says in printed.err
    assert sorted(source.parent.iterdir()) == there, "nothing is left behind"

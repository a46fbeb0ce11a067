"""Compiled programs that one test session keeps for the next. Half of the suite's time is compilation."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax

KEEP_ALL: dict[str, Any] = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@contextmanager
def kept_compilations(directory: Path) -> Iterator[None]:
    """Keep what this process compiles in `directory`, or until the end if another process uses that.

    JAX does not write its entries atomically, and never replaces one. Therefore one process at a time uses a directory,
    and a directory whose last process was killed is emptied.
    """
    with open(directory.with_suffix(".lock"), "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with TemporaryDirectory() as temporary:
                _keep_in(temporary)
                yield
            return
        if lock.tell():  # the last process did not reach the end
            shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(exist_ok=True)
        lock.write("in use")
        lock.flush()
        _keep_in(str(directory))
        yield
        lock.truncate(0)


def _keep_in(directory: str) -> None:
    for name, value in {**KEEP_ALL, "jax_compilation_cache_dir": directory}.items():
        jax.config.update(name, value)

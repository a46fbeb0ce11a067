"""Process-wide settings of the command: malloc, the compilation cache, and error output of threads."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import stat
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from bridge.errors import quoted
from gpt2_jax.console.cache import cache_directory

TUNABLES, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
_RESTARTED = "GPT2_BRIDGE_RESTARTED"
_previous_unraisablehook, _previous_excepthook = sys.unraisablehook, threading.excepthook
_TRANSPARENT_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Restart this command with glibc's malloc configured to request huge pages. Linux only.

    XLA on CPU allocates the temporaries of every step anew, and the kernel zeroes each page on first access. With pages
    of 4 KiB, these page faults take a tenth of a step at 124M (255,000 faults for 1 x 512 tokens) and a fifth at
    nanoGPT's CPU size. With pages of 2 MiB, their cost is not measurable. Keeping the memory (mallopt) is as fast, but
    fragments it: the peak was 6.8 GiB instead of 4.7 (4 x 1024 tokens). glibc reads its tunables only at process start.
    """
    environment = with_huge_pages(os.environ)
    # A separate variable marks the restart, because the system may remove glibc's variable from privileged processes.
    if environment == dict(os.environ) or os.environ.get(_RESTARTED):
        return
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    with suppress(OSError, ValueError):  # continue without huge pages
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**environment, _RESTARTED: "1"})


def with_huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` with huge pages enabled, or a copy if they are unavailable or already configured."""
    tunables = environment.get(TUNABLES, "")
    if sys.platform != "linux" or "hugetlb" in tunables or not _huge_pages_available():
        return dict(environment)
    return {**environment, TUNABLES: ":".join(filter(None, (tunables, HUGE_PAGES)))}


def _huge_pages_available() -> bool:
    try:
        return "[never]" not in _TRANSPARENT_HUGE_PAGES.read_text()
    except OSError:
        return False


def enable_compilation_cache(*, several_processes: bool = False) -> None:
    """Cache compiled XLA programs for later processes, unless JAX already has a cache directory.

    CPU programs are cached separately for each set of CPU features, because several machines may share a home directory
    and JAX's cache key does not include the features. CPU programs are not cached in two cases:

    - On Intel CPUs, XLA rejects its own cached programs with long messages (openxla/xla issue 44565).
    - With several processes, cached programs lose the order of their collectives: with two threads, one process may use
      another's operand for a different sum (jaxlib 0.10.2).

    Compiled programs are code, so the directory is created with mode 0700. A directory that belongs to another user or
    that others can write to is not used, and a line on standard error says so.

    Args:
        several_processes: other processes take part in the computation.
    """
    import jax  # not at the top, because verbs that compute nothing must not wait for it

    if jax.config.values.get("jax_compilation_cache_dir") is not None:
        return
    cpu = ""
    if jax.default_backend() == "cpu":
        cpu = _cpu()
        if "GenuineIntel" in cpu or several_processes:
            return
    with suppress(OSError, RuntimeError):  # no home directory: nothing is cached
        cache = cache_directory()
        folder = cache / "compiled" / hashlib.sha256(cpu.encode()).hexdigest()[:16]
        cache.parent.mkdir(parents=True, exist_ok=True)
        for path in (cache, folder.parent, folder):
            path.mkdir(mode=0o700, exist_ok=True)
            if problem := _untrusted(path):
                print(f"gpt2: compiled programs are not cached: {problem}", file=sys.stderr)
                return
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))


def _untrusted(path: Path) -> str | None:
    """Return why this directory is unsafe and what to do, or None if only this user can write to it."""
    status = path.stat()
    if not hasattr(os, "geteuid"):  # Windows has no such permissions
        return None
    if status.st_uid != os.geteuid():
        return f"{quoted(path)} belongs to another user; set XDG_CACHE_HOME to a directory of your own"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"other users can write to {quoted(path)}; remove its compiled programs and run chmod go-w on it"
    return None


def suppress_duplicate_tracebacks() -> None:
    """Suppress tracebacks from threads of Orbax and tensorboard. The main thread raises and reports the same errors."""
    logging.getLogger("absl").addFilter(_is_not_orbax_traceback)
    sys.unraisablehook = _unraisablehook
    threading.excepthook = _excepthook


def _is_not_orbax_traceback(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in Path(record.pathname).parts)


def _unraisablehook(unraisable: Any) -> None:
    """Suppress the error of tensorstore threads that use an event loop which Orbax has closed after an error."""
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        _previous_unraisablehook(unraisable)


def _excepthook(error: Any) -> None:
    if not type(error.thread).__module__.startswith("tensorboard."):
        _previous_excepthook(error)


def exit_now(code: int) -> NoReturn:
    """Flush the output and end the process. Skip exit handlers, which may wait for a peer or a compilation."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)


def _cpu() -> str:
    """Return vendor, model and features of the first core, or what Python's `platform` reports."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return "\n".join(line for line in first if line.startswith(("vendor_id", "model", "flags", "Features", "CPU ")))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"

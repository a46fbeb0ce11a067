"""Process-wide settings of the command: malloc, the compilation cache, and threads' error output."""

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
from typing import Any

import jax

from bridge.errors import quoted
from gpt2_jax.data.tokenize import cache_directory
from gpt2_jax.parallel.distributed import are_several

TUNABLES, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
_STARTED_AGAIN = "GPT2_BRIDGE_STARTED_AGAIN"
_unraisable_before, _in_thread_before = sys.unraisablehook, threading.excepthook
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def take_huge_pages() -> None:
    """Restart this command with glibc's malloc configured to request huge pages. Linux only.

    XLA on CPU allocates the temporaries of every step anew, and the kernel zeroes each page on first access. With pages
    of 4 KiB, that is 255,000 page faults and a tenth of a step at 124M (1 x 512 tokens), and a fifth at nanoGPT's CPU
    size; with pages of 2 MiB, the cost is not measurable. Keeping the memory (mallopt) is as fast, but fragments it:
    the peak was 6.8 GiB instead of 4.7 (4 x 1024 tokens). glibc reads its tunables only at process start.
    """
    environment = with_huge_pages(os.environ)
    # A variable of its own, because the system may keep glibc's from a privileged process.
    if environment == dict(os.environ) or os.environ.get(_STARTED_AGAIN):
        return
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    with suppress(OSError, ValueError):  # continue without huge pages
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**environment, _STARTED_AGAIN: "1"})


def with_huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` with huge pages enabled, or a copy if they are unavailable or already configured."""
    tunables = environment.get(TUNABLES, "")
    if sys.platform != "linux" or "hugetlb" in tunables or not _can_have_huge_pages():
        return dict(environment)
    return {**environment, TUNABLES: ":".join(filter(None, (tunables, HUGE_PAGES)))}


def _can_have_huge_pages() -> bool:
    try:
        return "[never]" not in _THP.read_text()
    except OSError:
        return False


def keep_compiled_programs() -> None:
    """Cache compiled XLA programs for later processes, unless JAX already has a cache directory.

    CPU programs are cached separately by CPU features, which JAX's key does not include, because several machines may
    share a home directory. Two cases are not cached. On Intel CPUs, XLA rejects its own programs with long messages
    (openxla/xla issue 44565). With several CPU processes, cached programs lose the order of their collectives, so that
    with two threads one process may mistake another's operand for that of a different sum (jaxlib 0.10.2).

    Compiled programs are code, so the directory is created with mode 0700. A directory that belongs to another user or
    that others can write to is not used, and a line on standard error says so.
    """
    if jax.config.values.get("jax_compilation_cache_dir") is not None:
        return
    about_cpu = ""
    if jax.default_backend() == "cpu":
        about_cpu = _cpu()
        if "GenuineIntel" in about_cpu or are_several():
            return
    with suppress(OSError, RuntimeError):  # no home directory: nothing is cached
        cache = cache_directory()
        folder = cache / "compiled" / hashlib.sha256(about_cpu.encode()).hexdigest()[:16]
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


def leave_errors_to_their_message() -> None:
    """Suppress tracebacks of threads of Orbax and tensorboard, whose errors are also raised in the waiting thread."""
    logging.getLogger("absl").addFilter(_is_no_traceback_of_orbax)
    sys.unraisablehook = _unraisable
    threading.excepthook = _in_thread


def _is_no_traceback_of_orbax(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in Path(record.pathname).parts)


def _unraisable(what: Any) -> None:
    """Suppress the error of tensorstore's threads when they use the event loop that Orbax closed after an error."""
    if not (isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == "Event loop is closed"):
        _unraisable_before(what)


def _in_thread(what: Any) -> None:
    if not type(what.thread).__module__.startswith("tensorboard."):
        _in_thread_before(what)


def _cpu() -> str:
    """Return vendor, model and features of the first core, or what Python's `platform` reports."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return "\n".join(line for line in first if line.startswith(("vendor_id", "model", "flags", "Features", "CPU ")))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"

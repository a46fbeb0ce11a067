"""What the command sets up for its own process before the work begins; libraries leave such things to their users."""

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
from gpt2_jax.processes import are_several

TUNABLES, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
_STARTED_AGAIN = "GPT2_BRIDGE_STARTED_AGAIN"
_unraisable_before, _in_thread_before = sys.unraisablehook, threading.excepthook
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def take_huge_pages() -> None:
    """Start this command once more, with glibc's malloc told to ask the kernel for huge pages; on Linux alone.

    XLA on CPU takes the memory of a step's temporaries anew for every step, and the kernel clears each page when it is
    first touched. In pages of 4 KiB that is 255,000 faults and a tenth of a step at 124M (1 x 512 tokens), and a
    fifth at nanoGPT's CPU size; in pages of 2 MiB, nothing that can be measured. Keeping the memory instead
    (mallopt) is as fast, but leaves holes: the peak was 6.8 GiB instead of 4.7 (4 x 1024 tokens). glibc reads its
    tunables only when a process starts.
    """
    environment = with_huge_pages(os.environ)
    # A variable of its own, because the system may keep glibc's from a privileged process.
    if environment == dict(os.environ) or os.environ.get(_STARTED_AGAIN):
        return
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    with suppress(OSError, ValueError):  # it runs as it is, then
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**environment, _STARTED_AGAIN: "1"})


def with_huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process whose malloc asks for huge pages, where that is possible and nothing is set."""
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
    """Let XLA's programs be found again by the next process, unless JAX has been told a directory for them.

    Programs for CPUs are kept apart by what the CPU can do, which JAX's own key does not hold: a home directory may be
    shared. On Intel's, XLA refuses its own programs and says so at length (openxla/xla issue 44565); none are kept.
    Nor are those of several processes on CPUs: read back, a program's collectives have no order any more, and with two
    threads one process takes for a sum what the other sent for another (jaxlib 0.10.2).

    Compiled programs are code: the folder is made for its owner alone. One that others may write to, or that belongs to
    another user, is not used, and a line on standard error says so.
    """
    if jax.config.values.get("jax_compilation_cache_dir") is not None:
        return
    about_cpu = ""
    if jax.default_backend() == "cpu":
        about_cpu = _cpu()
        if "GenuineIntel" in about_cpu or are_several():
            return
    with suppress(OSError, RuntimeError):  # no home directory: nothing is kept
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
    """Why another user could have put programs into this directory, and what to do; None where none could."""
    status = path.stat()
    if not hasattr(os, "geteuid"):  # Windows has no such permissions
        return None
    if status.st_uid != os.geteuid():
        return f"{quoted(path)} belongs to another user; set XDG_CACHE_HOME to a directory of your own"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {quoted(path)}; remove its compiled programs and run chmod go-w on it"
    return None


def leave_errors_to_their_message() -> None:
    """The threads of orbax and tensorboard give their errors to who waits for them, which makes one line of them here;
    and print a traceback of each as well."""
    logging.getLogger("absl").addFilter(_is_no_traceback_of_orbax)
    sys.unraisablehook = _unraisable
    threading.excepthook = _in_thread


def _is_no_traceback_of_orbax(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in Path(record.pathname).parts)


def _unraisable(what: Any) -> None:
    """After an error orbax closes its event loop, and tensorstore's threads still want to tell that of the others."""
    if not (isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == "Event loop is closed"):
        _unraisable_before(what)


def _in_thread(what: Any) -> None:
    if not type(what.thread).__module__.startswith("tensorboard."):
        _in_thread_before(what)


def _cpu() -> str:
    """The maker, the model and the abilities of the first core, or what Python knows of it."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return "\n".join(line for line in first if line.startswith(("vendor_id", "model", "flags", "Features", "CPU ")))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"

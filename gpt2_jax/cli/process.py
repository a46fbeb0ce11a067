"""What the command sets up for its own process before the work begins; libraries leave such things to their users."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax

from gpt2_jax.data.tokenize import cache_directory

_TUNABLES, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def take_huge_pages() -> None:
    """Start this command once more, with glibc's malloc told to ask the kernel for huge pages; on Linux alone.

    XLA on CPU takes the memory of a step's temporaries anew for every step, and the kernel clears each page when it is
    first touched. In pages of 4 KiB that is 255,000 faults and a tenth of a step at 124M (1 x 512 tokens), and a
    fifth at nanoGPT's CPU size; in pages of 2 MiB, nothing that can be measured. Keeping the memory instead
    (mallopt) is as fast, but leaves holes: the peak was 6.8 GiB instead of 4.7 (4 x 1024 tokens). glibc reads its
    tunables only when a process starts.
    """
    if sys.platform != "linux" or "hugetlb" in os.environ.get(_TUNABLES, "") or not _can_have_huge_pages():
        return
    tunables = ":".join(filter(None, (os.environ.get(_TUNABLES), _HUGE_PAGES)))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, _TUNABLES: tunables})


def _can_have_huge_pages() -> bool:
    try:
        return "[never]" not in _THP.read_text()
    except OSError:
        return False


def keep_compiled_programs() -> None:
    """Let XLA's programs be found again by the next process, unless JAX has been told a directory for them."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))

"""Causes of failed writes: a full disk, a file size limit, a read-only file system, missing permission."""

from __future__ import annotations

import math
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

PAGE = 4096
"""Files on a tmpfs take multiples of this."""
INSIDE = "GPT2_FAULTS_NAMESPACE"
"""The environment variable of a process started with `namespace`."""


@dataclass(frozen=True)
class Fault:
    name: str
    lasting: Callable[[], AbstractContextManager[None]]
    """A context manager that applies the fault."""
    why: str
    """The error message of the system."""

    @classmethod
    def full(cls, disk: Path, leave: int) -> Fault:
        return cls(f"{leave:,} bytes free", partial(_filled, disk, leave), "No space left on device")

    @classmethod
    def limit(cls, size: int) -> Fault:
        """Limit the size of every file written by this process and its children."""
        return cls(f"files of at most {size:,} bytes", partial(_limited, size), "File too large")

    @classmethod
    def read_only(cls, disk: Path) -> Fault:
        return cls("read-only", partial(_remounted, disk), "Read-only file system")

    @classmethod
    def forbidden(cls, place: Path) -> Fault:
        """Remove write permission for everyone. After `enter_namespace`, it holds for root too."""
        return cls("no permission", partial(_forbidden, place), "Permission denied")


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    """Mount a tmpfs of this size in bytes."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def taken(path: Path) -> int:
    """Return the bytes that a file, or all files of a directory, take on a tmpfs."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return PAGE * sum(math.ceil(file.stat().st_size / PAGE) for file in files)


def namespace() -> list[str]:
    """Return a command prefix: its process can mount file systems that only it sees, and permissions hold for root.

    Raises `OSError` if the system does not allow it.
    """
    for options in (["--mount"], ["--user", "--map-root-user", "--mount"]):
        command = ["unshare", *options, "setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", "--"]
        with tempfile.TemporaryDirectory() as place, suppress(FileNotFoundError):
            mount = [*command, "mount", "-t", "tmpfs", "none", place]
            if subprocess.run(mount, capture_output=True).returncode == 0:
                return command
    raise OSError("cannot mount file systems here: needs util-linux, and root or user namespaces")


def enter_namespace() -> None:
    """Restart this command in a namespace in which it can mount file systems."""
    if INSIDE not in os.environ:
        os.environ[INSIDE] = "1"
        command = [*namespace(), sys.executable, *sys.orig_argv[1:]]
        os.execvp(command[0], command)


@contextmanager
def _filled(disk: Path, leave: int) -> Iterator[None]:
    state, filler = os.statvfs(disk), disk / "filler"
    try:
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize - leave)
        yield
    finally:
        filler.unlink()


@contextmanager
def _limited(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def _remounted(disk: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)


@contextmanager
def _forbidden(place: Path) -> Iterator[None]:
    directories = [place, *(path for path in place.rglob("*") if path.is_dir())]
    for path in directories:
        path.chmod(0o555)
    try:
        yield
    finally:
        for path in directories:
            path.chmod(0o755)

"""Trace the system calls with which a process and its threads change a directory, and kill it before one of them.

This is a tracer like strace (ptrace(2)). strace counts the calls of each thread separately, so it cannot kill a process
with many threads before each call in turn. Changes through mapped memory are not system calls and are not detected.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

CALLS = {
    1: ("write", "f"),
    2: ("open", "po"),
    18: ("pwrite64", "f"),
    20: ("writev", "f"),
    40: ("sendfile", "f"),
    74: ("fsync", "f"),
    75: ("fdatasync", "f"),
    76: ("truncate", "p"),
    77: ("ftruncate", "f"),
    82: ("rename", "pp"),
    83: ("mkdir", "p"),
    84: ("rmdir", "p"),
    85: ("creat", "p"),
    86: ("link", "pp"),
    87: ("unlink", "p"),
    88: ("symlink", ".p"),
    257: ("openat", "dpo"),
    258: ("mkdirat", "dp"),
    263: ("unlinkat", "dp"),
    264: ("renameat", "dpdp"),
    265: ("linkat", "dpdp"),
    266: ("symlinkat", ".dp"),
    285: ("fallocate", "f"),
    296: ("pwritev", "f"),
    316: ("renameat2", "dpdp"),
    326: ("copy_file_range", "..f"),
    328: ("pwritev2", "f"),
}
"""System calls of x86-64: number -> (name, kinds of arguments).

The kinds are f, a file descriptor; p, a path; d, the directory of the next path; o, the flags of open, of which only
those that create or truncate a file matter; and ., anything else.
"""

_SYSCALL, _SEIZE, _INTERRUPT, _GET_SYSCALL_INFO = 24, 0x4206, 0x4207, 0x420E  # of PTRACE_
_OPTIONS = 0x1 | 0x2 | 0x4 | 0x8 | 0x100000  # of PTRACE_O_: TRACESYSGOOD, TRACEFORK, TRACEVFORK, TRACECLONE, EXITKILL
_AT_SYSCALL = signal.SIGTRAP | 0x80
_ENTRY, _WALL, _FROM_HERE = 1, 0x40000000, 0xFFFFFF9C  # PTRACE_SYSCALL_INFO_ENTRY, __WALL, AT_FDCWD


@dataclass(frozen=True)
class Call:
    """A system call that changes a file. Paths below the directory are relative to it."""

    name: str
    path: str
    to: str | None = None
    """The new name of a rename or a link."""


class _SyscallInfo(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_uint8),
        ("arch", ctypes.c_uint32),
        ("instruction_pointer", ctypes.c_uint64),
        ("stack_pointer", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
    )


def why_not() -> str | None:
    """Return why tracing is impossible here, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "tracing uses the system call numbers of Linux on x86-64"
    try:
        trace(lambda: None, Path("/"))
    except OSError as error:
        return f"a process cannot be traced here: {error.strerror}"
    return None


def trace(work: Callable[[], object], below: Path, kill_at: int | None = None) -> tuple[list[Call], int]:
    """Run `work` in a forked process. Returns its changes below a directory and its exit status: 0, or -SIGKILL.

    kill_at: kill the process before the call of this number, counted from 1; that call is the last in the list.

    Raises `OSError` where the system does not allow it.
    """
    below, calls = below.resolve(), list[Call]()
    child = _forked_and_seized(work)
    while True:
        thread, status = os.waitpid(-child, _WALL)
        if not os.WIFSTOPPED(status):
            if thread == child:
                return calls, os.waitstatus_to_exitcode(status)
            continue
        stopped_by = os.WSTOPSIG(status)
        is_signal = stopped_by != _AT_SYSCALL and not status >> 16  # not an event of tracing
        with suppress(ProcessLookupError, FileNotFoundError):  # the thread has already ended
            if stopped_by == _AT_SYSCALL and len(calls) != kill_at:
                calls += _change(thread, below)
                if len(calls) == kill_at:
                    os.killpg(child, signal.SIGKILL)
            _ptrace(_SYSCALL, thread, None, stopped_by if is_signal else None)


def flushed(calls: Iterable[Call]) -> set[str]:
    """Return the files and directories that are flushed after these calls. A directory is flushed with its names."""
    there: set[str] = set()
    for call in calls:
        if call.name in ("fsync", "fdatasync"):
            there.add(call.path)
        elif call.name.startswith("rename"):
            assert call.to is not None
            there = {_renamed(path, call.path, call.to) for path in there}
            there -= {os.path.dirname(call.path) or ".", os.path.dirname(call.to) or "."}
        elif "p" in dict(CALLS.values())[call.name]:
            there -= {call.path, os.path.dirname(call.path) or "."}
        else:
            there.discard(call.path)
    return there


def _renamed(path: str, old: str, new: str) -> str:
    return new + path[len(old) :] if path == old or path.startswith(f"{old}/") else path


def _forked_and_seized(work: Callable[[], object]) -> int:
    """Fork the leader of a new process group, which runs `work` when it is traced."""
    wait, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        os.read(wait, 1)
        end_with(work)
    os.setpgid(child, child)
    try:
        _ptrace(_SEIZE, child, None, _OPTIONS)
        _ptrace(_INTERRUPT, child, None, None)  # from now on, it stops at every call
    except OSError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    finally:
        os.close(wait)
        os.close(go)
    return child


def end_with(work: Callable[[], object]) -> NoReturn:
    """Run this in a forked process, then exit."""
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _change(thread: int, below: Path) -> Iterator[Call]:
    """Return the next call of a thread if it changes something below the directory."""
    info = _SyscallInfo()
    _ptrace(_GET_SYSCALL_INFO, thread, ctypes.sizeof(info), ctypes.addressof(info))
    if info.op != _ENTRY or info.number not in CALLS:
        return
    name, kinds = CALLS[info.number]
    process, paths = Path(f"/proc/{thread}"), list[str]()
    start = process / "cwd"
    for kind, argument in zip(kinds, info.arguments, strict=False):
        if kind == "f":
            paths.append(_target(process / "fd" / str(argument & 0xFFFFFFFF)))
        elif kind == "d":
            start = process / "cwd" if argument & 0xFFFFFFFF == _FROM_HERE else process / "fd" / str(argument)
        elif kind == "p":
            paths.append(os.path.normpath(os.path.join(_target(start), _text(process, argument))))
        elif kind == "o" and not argument & (os.O_CREAT | os.O_TRUNC):
            return
    if any(Path(path).is_relative_to(below) for path in paths):
        yield Call(name, *(os.path.relpath(path, below) for path in paths))


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except FileNotFoundError:
        return ""  # an invalid descriptor; the call will fail


def _text(process: Path, address: int) -> str:
    """Read a path from the memory of a process."""
    text, page = b"", 4096
    with (process / "mem").open("rb", buffering=0) as memory:
        while b"\0" not in text:
            memory.seek(address + len(text))
            text += memory.read(page - (address + len(text)) % page)  # the next page may not be mapped
    return os.fsdecode(text.partition(b"\0")[0])


def _ptrace(request: int, process: int, address: int | None, data: int | None) -> None:
    if _libc().ptrace(request, process, address, data) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    return libc

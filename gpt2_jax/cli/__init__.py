"""The `gpt2` command: one file per verb."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from gpt2_jax.cli.verbs import VERBS, load_verb, top_level
from gpt2_jax.console.suggestions import did_you_mean

BAD_INPUT = 2


def main(args: list[str] | None = None) -> None:
    """Run one verb. Bad input exits with status 2 and a message, never with a traceback.

    Args:
        args: the words after `gpt2`. By default they are those of `sys.argv`, and the command owns its process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # print ? for a character that the terminal cannot encode, such as ✓
    words = sys.argv[1:] if args is None else args
    if words == ["--version"]:
        from bridge import __version__

        print(f"gpt2-bridge {__version__}")
        sys.exit(0)
    _exit(*_run(words, own_process=args is None), own_process=args is None)


def _run(words: Sequence[str], *, own_process: bool) -> tuple[int, str]:
    """Run a verb. Return the exit code and, for other processes of the same run, the reason if it failed."""
    try:
        if not words or words[0].startswith("-"):
            top_level(words)
        return _run_verb(*words, own_process=own_process), ""
    except KeyboardInterrupt:
        return 128 + signal.SIGINT, "it was interrupted"  # as a shell reports it
    except Exception as error:
        return _failure(error)


def _run_verb(name: str, *args: str, own_process: bool) -> int:
    # Imported here, because `gpt2 --help` starts in a fraction of the time without numpy.
    from bridge import BridgeError
    from bridge.errors import quoted
    from gpt2_jax.cli.parsing import parse_and_run
    from gpt2_jax.console.process import suppress_duplicate_tracebacks

    suppress_duplicate_tracebacks()
    if name not in VERBS:
        raise BridgeError(f"unknown verb {quoted(name)}: must be one of {', '.join(VERBS)}{did_you_mean(name, VERBS)}")
    return parse_and_run(load_verb(name, args, own_process=own_process), name, [*args]) or 0


def _failure(error: Exception) -> tuple[int, str]:
    """Print the message of an expected error. Return the exit code and the reason."""
    from bridge import BridgeError
    from bridge.errors import quoted
    from gpt2_jax.console.terminal import print_error

    if isinstance(error, BrokenPipeError):  # for example, `head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at exit raises again
        return 128 + signal.SIGPIPE, "its standard output was closed"
    if isinstance(error, OSError):  # a full disk, a name that is too long, no permission
        where = f"{quoted(error.filename)}: " if error.filename else ""
        why = f"{where}{error.strerror or error}"
        print_error(why)
        return BAD_INPUT, why
    _exit_if_peer_failed(error)
    if isinstance(error, BridgeError):
        print_error(str(error))
        return BAD_INPUT, str(error)
    return _unexpected(error)


def _distributed() -> Any:
    """Return `gpt2_jax.parallel.distributed` if a verb has imported it. It imports JAX, so `main` does not."""
    return sys.modules.get("gpt2_jax.parallel.distributed")


def _exit_if_peer_failed(error: Exception) -> None:
    if (distributed := _distributed()) is not None:
        distributed.exit_if_peer_failed(error)


def _unexpected(error: Exception) -> tuple[int, str]:
    """Print the traceback if other processes must be told the reason. Otherwise, Python prints it."""
    from bridge.errors import escaped

    distributed = _distributed()
    if distributed is None or not distributed.are_several():
        raise error
    print(escaped(traceback.format_exc()), file=sys.stderr, end="")
    return 1, f"{type(error).__name__}: {error}"


def _exit(code: int, why: str, *, own_process: bool) -> NoReturn:
    """End this process, and tell the other processes of the same run why."""
    from gpt2_jax.console.process import exit_now

    distributed = _distributed()
    if code and own_process and (distributed is None or not distributed.are_several()):
        end_now = exit_now if distributed is None else distributed.end_now
        end_now(code)  # without waiting for pending compilations or writes
    if distributed is not None:
        distributed.end(code, why)
    sys.exit(code)

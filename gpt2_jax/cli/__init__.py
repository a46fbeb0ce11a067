"""The `gpt2` command: one file per verb."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import tyro

from bridge import BridgeError, __version__
from bridge.errors import escaped, quoted
from gpt2_jax.cli.bench import bench
from gpt2_jax.cli.convert import convert
from gpt2_jax.cli.demo import demo
from gpt2_jax.cli.eval import evaluate
from gpt2_jax.cli.generate import generate
from gpt2_jax.cli.inspect import inspect
from gpt2_jax.cli.plan import plan_command
from gpt2_jax.cli.train import default_config, train_command, wants_determinism
from gpt2_jax.cli.verify import verify
from gpt2_jax.console.process import enable_compilation_cache, restart_with_huge_pages, suppress_duplicate_tracebacks
from gpt2_jax.console.terminal import print_error
from gpt2_jax.parallel import distributed as processes
from gpt2_jax.training.determinism import make_deterministic

BAD_INPUT = 2
COMPILING = {"verify", "generate", "train", "eval", "demo"}
"""Verbs that cache compiled programs. `bench` does not, because it measures compilation."""

VERBS: dict[str, Callable[..., Any]] = {
    "inspect": inspect,
    "convert": convert,
    "verify": verify,
    "generate": generate,
    "eval": evaluate,
    "bench": bench,
    "demo": demo,
}


def main(args: list[str] | None = None) -> None:
    """Run one verb. Bad input exits with status 2 and a message, never with a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ✓ gets ?, not a traceback
    if args is None and sys.argv[1:2] in (["train"], ["demo"]):  # a process of our own
        restart_with_huge_pages()
    suppress_duplicate_tracebacks()
    if (sys.argv[1:] if args is None else args) == ["--version"]:
        print(f"gpt2-bridge {__version__}")
        sys.exit(0)
    code: int | None
    why = ""
    try:
        default = default_config(sys.argv[1:] if args is None else args)
        if args is None and sys.argv[1:2] == ["train"] and wants_determinism(sys.argv, default):
            make_deterministic()
        asks = {"--help", "--distributed"} & {*sys.argv}  # JAX must not look for its devices before processes join
        if args is None and set(sys.argv[1:2]) & COMPILING and not asks:
            enable_compilation_cache()
        verbs = {**VERBS, "train": train_command(default), "plan": plan_command(default)}
        code = tyro.extras.subcommand_cli_from_dict(
            verbs, prog="gpt2", description="GPT-2 in PyTorch and JAX, and the bridge between.", args=args
        )
    except BridgeError as error:
        processes.exit_if_peer_failed(error)
        why = str(error)
        print_error(why)
        code = BAD_INPUT
    except BrokenPipeError:  # as `head` closes its input
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails again when it flushes
        why, code = "nobody reads what it prints", 128 + signal.SIGPIPE
    except OSError as error:  # a full disk, a name that is too long, no permission
        where = f"{quoted(error.filename)}: " if error.filename else ""
        why = f"{where}{error.strerror or error}"
        print_error(why)
        code = BAD_INPUT
    except KeyboardInterrupt:
        why = "it was interrupted"
        code = 130  # as a shell reports a process ended by SIGINT
    except Exception as error:
        if not processes.are_several():
            raise
        processes.exit_if_peer_failed(error)
        why = f"{type(error).__name__}: {error}"
        print(escaped(traceback.format_exc()), file=sys.stderr, end="")
        code = 1
    if code and args is None and not processes.are_several():
        processes.end_now(code)  # without waiting for what may still be compiled, or written
    processes.end(code or 0, why)

"""The verbs of the command. Their modules are imported only when a verb runs, so that `gpt2 --help` is quick."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Verb:
    """One verb: where its function is, and what the process needs before the function is called."""

    module: str
    function: str
    summary: str
    """The line of `gpt2 --help`."""
    takes_config: bool = False
    """`function` takes a `TrainConfig`, the defaults of the flags, and returns the verb."""
    compiles: bool = False
    """Enable the compilation cache first. `train` does so itself. `bench` does not, because it measures compilation."""
    trains: bool = False
    """Restart with huge pages first. `train` does so itself, after its flags are parsed."""


VERBS: Mapping[str, Verb] = {
    "inspect": Verb("inspect", "inspect", "Show the format, configuration, tensors and warnings of a checkpoint."),
    "convert": Verb("convert", "convert", "Convert a checkpoint to another format, bit for bit."),
    "verify": Verb("verify", "verify", "Check that PyTorch and JAX compute the same function.", compiles=True),
    "diff": Verb("diff", "diff", "Show how two checkpoints differ, from configuration to logits.", compiles=True),
    "generate": Verb("generate", "generate", "Continue one or more prompts.", compiles=True),
    "eval": Verb("eval", "evaluate", "Measure loss, perplexity and bits per byte on a text.", compiles=True),
    "train": Verb("train", "train_command", "Train or fine-tune in JAX, and export for PyTorch.", takes_config=True),
    "plan": Verb("plan", "plan_command", "Estimate memory and time of a step on other devices.", takes_config=True),
    "push": Verb("push", "push", "Upload a checkpoint to the Hugging Face hub, with a model card."),
    "bench": Verb("bench", "bench", "Measure the speed of JAX, PyTorch and transformers."),
    "demo": Verb("demo", "demo", "Convert, verify, fine-tune and export a small model.", compiles=True, trains=True),
}

BATCH_INVARIANCE = "batch-invariance"
"""The check of `gpt2 verify` that needs one thread, as `--batch-invariant` does."""

DESCRIPTION = """GPT-2 in PyTorch and JAX, and a bridge between them.

Run `gpt2 VERB --help` for the flags of a verb, and `gpt2 --version` for the version.

Shell completion: `gpt2 --tyro-print-completion bash` prints a script to source; zsh, fish and tcsh work too."""


def load_verb(name: str, words: Sequence[str], *, own_process: bool = False) -> Callable[..., Any]:
    """Import a verb and return its function.

    Args:
        words: the words after the verb. They select the preset or run that gives `train` and `plan` their defaults.
        own_process: the command owns its process, so the verb may change settings of the whole process. This happens
            after the flags are parsed and before JAX starts.
    """
    verb = VERBS[name]
    function: Callable[..., Any] = getattr(import_module(f"gpt2_jax.cli.verbs.{verb.module}"), verb.function)
    if verb.takes_config:
        from gpt2_jax.cli.config_flags import default_config

        default = default_config(name, words)
        return function(default, own_process=True) if own_process and name == "train" else function(default)
    if not own_process or not verb.compiles:
        return function

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        from gpt2_jax.console.process import enable_compilation_cache, restart_with_huge_pages

        if kwargs.get("batch_invariant") or BATCH_INVARIANCE in (kwargs.get("checks") or ()):
            os.environ["NPROC"] = "1"  # the number of threads, which XLA reads when JAX starts
        if verb.trains:
            restart_with_huge_pages()
        enable_compilation_cache()
        return function(*args, **kwargs)

    return run


def top_level(words: Sequence[str]) -> None:
    """Handle a command that does not begin with a verb: print the help, a completion script, or an error, and exit."""
    import tyro

    if words and words[0].replace("_", "-") in ("--tyro-print-completion", "--tyro-write-completion"):
        from gpt2_jax.cli.parsing import REGISTRY, unwrap_help

        verbs = {name: unwrap_help(load_verb(name, ())) for name in VERBS}
        tyro.extras.subcommand_cli_from_dict(verbs, prog="gpt2", args=words, registry=REGISTRY)
    tyro.extras.subcommand_cli_from_dict(
        {name: _placeholder(verb.summary) for name, verb in VERBS.items()},
        prog="gpt2",
        description=DESCRIPTION,
        args=words,
    )


def _placeholder(summary: str) -> Callable[[], None]:
    """Return a function whose docstring is the line of a verb in `gpt2 --help`."""

    def verb() -> None: ...

    verb.__doc__ = summary
    return verb

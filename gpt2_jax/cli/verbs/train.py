"""`gpt2 train`: train or fine-tune in JAX."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, arg

from bridge import BridgeError
from bridge.errors import quoted
from gpt2_jax.cli.arguments import JsonFile
from gpt2_jax.cli.config_flags import ConfigFlags, config_flags, values_of
from gpt2_jax.cli.effect import OVERWRITE, Rule, require_effect
from gpt2_jax.console.process import enable_compilation_cache, restart_with_huge_pages
from gpt2_jax.training.config import TrainConfig, flat, from_flat, validation_sets
from gpt2_jax.training.determinism import make_deterministic

RULES = (
    Rule(("accept_changes",), lambda v: not v["resume"], "without --resume"),
    Rule(("validation_fraction",), lambda v: v["validation_data"], "with --validation-data"),
    Rule(
        ("muon_learning_rate", "muon_momentum", "muon_weight_decay"),
        lambda v: v["optimizer"] != "muon",
        "without --optimizer muon",
    ),
    Rule(("min_learning_rate",), lambda v: v["schedule"] == "constant", "with --schedule constant"),
    Rule(("decay_steps",), lambda v: v["schedule"] != "cosine", "without --schedule cosine"),
    Rule(("decay_fraction",), lambda v: v["schedule"] != "wsd", "without --schedule wsd"),
    Rule(
        ("lora_alpha", "lora_targets", "lora_dropout", "lora_rslora"),
        lambda v: not v["lora_rank"],
        "without --lora-rank",
    ),
    Rule(("sample_prompt",), lambda v: v["sample_tokens"] == 0, "with --sample-tokens 0"),
    Rule(("json", "tensorboard", "wandb"), lambda v: v["show_examples"] is not None, "with --show-examples"),
    OVERWRITE,
)

DEFAULT_CACHE = "(default: gpt2-bridge in the user's cache directory)"


def train_command(default: TrainConfig, own_process: bool = False) -> Callable[..., int]:
    """Return the verb with the values of `default` as the defaults of its flags.

    Args:
        own_process: the command owns its process, so it may change settings of the whole process.
    """
    flags = config_flags(default)

    def train(
        *,
        config: Annotated[ConfigFlags, OmitArgPrefixes, arg(name="")] = flags,
        out: Annotated[Path, arg(metavar="RUN")],
        resume: bool = False,
        accept_changes: bool = False,
        cache: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint=DEFAULT_CACHE)] = None,
        show_examples: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None,
        json: JsonFile = None,
        overwrite: bool = False,
        distributed: bool = False,
        coordinator: Annotated[str | None, arg(metavar="HOST:PORT")] = None,
        processes: int | None = None,
        process: int | None = None,
    ) -> int:
        """Train or fine-tune a GPT-2 in JAX and export it in Hugging Face format, which PyTorch can load.

        Example: gpt2 train --preset shakespeare-char --data input.txt --out runs/shakespeare

        Then: gpt2 generate runs/shakespeare "ROMEO:"

        Args:
            config: the configuration; --preset sets the default of every other flag.
            out: the directory of the run: its checkpoints, metrics.jsonl, loss.png and export.
            resume: continue from the newest checkpoint in RUN, with the flags that it was started with.
            accept_changes: resume although flags or data changed.
            cache: the directory for tokenised text.
            show_examples: print the first N training examples, token by token, with what counts in the loss, and exit
                without training.
            json: also write the result to this file.
            overwrite: replace the report of an earlier command. A run is never overwritten.
            distributed: train with several processes that all run this command. They find each other on TPU pods and
                under SLURM and Open MPI. RUN must be on a file system that all processes share.
            coordinator: on other systems: the address of the first process.
            processes: on other systems: the number of processes.
            process: on other systems: the index of this process, from 0.
        """
        values = values_of(config)
        if own_process:
            _set_up_process(values["deterministic"])
        if distributed:
            _join(coordinator, processes, process)
        elif (coordinator, processes, process) != (None, None, None):
            raise BridgeError("--coordinator, --processes and --process require --distributed")
        options = {
            "resume": resume,
            "accept_changes": accept_changes,
            "overwrite": overwrite,
            "json": json,
            "show_examples": show_examples,
        }
        _check_flags(values, options, flat(default), cache)
        if own_process and not distributed:
            enable_compilation_cache()
        from gpt2_jax.cli.run_training import preview, train_and_report  # not at the top, because it imports JAX

        if show_examples is not None:
            preview(from_flat(values), out, show_examples, resume=resume, cache=cache)
            return 0

        return train_and_report(
            from_flat(values),
            out,
            default=default,
            resume=resume,
            accept_changes=accept_changes,
            cache=cache,
            json=json,
            overwrite=overwrite,
        )

    return train


def _set_up_process(deterministic: bool) -> None:
    """Change settings before JAX starts: those of malloc need a new process, and XLA reads its flags once."""
    restart_with_huge_pages()
    if deterministic:
        make_deterministic()


def _check_flags(
    values: Mapping[str, Any], options: Mapping[str, Any], defaults: Mapping[str, Any], cache: Path | None
) -> None:
    """Raise `BridgeError` for flags that have no effect together, and for a cache that is an input."""
    usual = {**defaults, **dict.fromkeys(("resume", "accept_changes", "overwrite"), False), "json": None}
    require_effect({**values, **options}, usual, RULES)
    inputs = (*_data_of(values), values["init_from"], values["base"])
    _require_cache(cache, inputs)
    _require_effect_on_tokens(values, usual, cache)


def _join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Join the other processes, before JAX looks for its devices."""
    from gpt2_jax.parallel import distributed

    distributed.join(coordinator, processes, process)
    enable_compilation_cache(several_processes=distributed.are_several())


def _require_cache(cache: Path | None, inputs: Sequence[str | None]) -> None:
    """Raise if the cache is a file or an input of this command: its files would be mistaken for input."""
    if cache is None or not cache.exists():
        return
    if not cache.is_dir() or any(source and os.path.exists(source) and cache.samefile(source) for source in inputs):
        raise BridgeError(f"--cache {quoted(cache)} is a file, or an input of this command; give another directory")


def _data_of(values: Mapping[str, Any]) -> list[str]:
    """Return the sources of training and validation data, with those of a mixture."""
    from gpt2_jax.data.file_kinds import is_mixture_file  # not at the top: they import numpy
    from gpt2_jax.data.mixture_file import read_mixture

    data = values["data"]
    mixed = read_mixture(data) if is_mixture_file(data) else ()
    return [data, *(part.path for part in mixed), *validation_sets(values["validation_data"]).values()]


def _require_effect_on_tokens(values: Mapping[str, Any], defaults: Mapping[str, Any], cache: Path | None) -> None:
    """Raise `BridgeError` for flags that have no effect on token files."""
    from gpt2_jax.data.tokens.stream import (  # not at the top: it imports jaxtyping
        has_validation_files,
        is_token_source,
    )

    if not all(map(is_token_source, _data_of(values))):
        return
    problems = []
    if cache is not None:
        problems.append("--cache: has no effect, because token files are not tokenised; leave it out")
    is_given = values["validation_fraction"] != defaults["validation_fraction"]
    if is_given and has_validation_files(values["data"]):
        problems.append("--validation-fraction: has no effect, because --data has validation files; leave it out")
    if problems:
        raise BridgeError("\n".join(problems))

"""`gpt2 train`: train or fine-tune in JAX."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from jax.errors import JaxRuntimeError
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from tyro.conf import OmitArgPrefixes, arg

import bridge
from bridge import BridgeError, Checkpoint, GPT2Config
from bridge.errors import escaped, quoted
from bridge.formats.run import steps
from gpt2_jax.cli.arguments import JsonFile
from gpt2_jax.cli.effect import OVERWRITE, Rule, require_effect
from gpt2_jax.cli.init_from import chosen_tokenizer, require_rows, require_sizes, sizes_asked_for
from gpt2_jax.console.output import json_writer, progress
from gpt2_jax.console.process import keep_compiled_programs
from gpt2_jax.console.terminal import Console, console, print_error
from gpt2_jax.data import Data, open_data
from gpt2_jax.parallel.distributed import broadcast_from_first, end, end_now, first_alone, is_first, join, leave
from gpt2_jax.training import PRESETS, NonFiniteLoss, Outcome, TrainConfig, resolve_config, train
from gpt2_jax.training.config import TOKENIZER_OF_INIT_FROM, flat, from_flat, is_out_of_memory
from gpt2_jax.training.preemption import PreemptionHandler
from gpt2_jax.training.run.directory import is_run, stored_identity
from gpt2_jax.training.run.metrics import require_packages

DEFAULT_PRESET, DEFAULT_FINETUNING_PRESET = "nano", "finetune"
DIVERGED = 1
RULES = (
    Rule(("accept_changes",), lambda v: not v["resume"], "without --resume"),
    Rule(("validation_fraction",), lambda v: v["validation_data"] is not None, "with --validation-data"),
    Rule(
        ("muon_learning_rate", "muon_momentum", "muon_weight_decay"),
        lambda v: v["optimizer"] != "muon",
        "without --optimizer muon",
    ),
    Rule(("min_learning_rate",), lambda v: v["schedule"] == "constant", "with --schedule constant"),
    Rule(("decay_steps",), lambda v: v["schedule"] != "cosine", "without --schedule cosine"),
    Rule(("decay_fraction",), lambda v: v["schedule"] != "wsd", "without --schedule wsd"),
    Rule(("sample_prompt",), lambda v: v["sample_tokens"] == 0, "with --sample-tokens 0"),
    OVERWRITE,
)

_DETERMINISTIC = {"--deterministic": True, "--no-deterministic": False}


@dataclass(frozen=True)
class _Model(GPT2Config):
    def __post_init__(self) -> None:
        """Skip validation here, because tyro would wrap the error message. It is done later."""


@dataclass(frozen=True)
class Flags(TrainConfig):
    model: _Model = field(default_factory=_Model)
    """Sizes of the model. The tokenizer determines the vocabulary; with --init-from SRC, SRC determines all sizes."""

    def __post_init__(self) -> None:
        """Skip validation here, as above."""


def flags_of(default: TrainConfig) -> Flags:
    """Return a type with every field as a flag and the values of `default` as defaults."""
    return Flags(**{**vars(default), "model": _Model(**vars(default.model))})


def train_command(default: TrainConfig) -> Callable[..., int]:
    """Return the verb with the values of `default` as the defaults of its flags."""
    flags = flags_of(default)

    def train(
        *,
        config: Annotated[Flags, OmitArgPrefixes] = flags,
        out: Annotated[Path, arg(metavar="RUN")],
        resume: bool = False,
        accept_changes: bool = False,
        cache: Annotated[Path | None, arg(metavar="DIR")] = None,
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
            cache: the directory for tokenised text (default: gpt2-bridge in the user's cache directory).
            json: also write the result to this file.
            overwrite: replace the report of an earlier command. A run is never overwritten.
            distributed: train with several processes that all run this command. They find each other on TPU pods and
                under SLURM and Open MPI. RUN must be on a file system that all processes share.
            coordinator: on other systems: the address of the first process.
            processes: on other systems: the number of processes.
            process: on other systems: the index of this process, from 0.
        """
        if distributed:
            join(coordinator, processes, process)
            keep_compiled_programs()
        elif (coordinator, processes, process) != (None, None, None):
            raise BridgeError("--coordinator, --processes and --process go with --distributed")
        asked = {"resume": resume, "accept_changes": accept_changes, "overwrite": overwrite, "json": json}
        usual = {**flat(default), **dict.fromkeys(("resume", "accept_changes", "overwrite"), False)}
        require_effect({**flat(config), **asked}, usual, RULES)
        inputs = (config.data, config.validation_data, config.init_from)
        _require_cache(cache, inputs)
        write_json = json_writer(json if is_first() else None, overwrite, inputs)
        try:
            outcome = run_training(
                from_flat(flat(config)),
                out,
                default=default,
                resume=resume,
                accept_changes=accept_changes,
                cache=cache,
            )
        except NonFiniteLoss as error:
            why = f"{error}; earlier checkpoints are in {out}. Lower --learning-rate, or raise --warmup-steps"
            if is_first():
                print_error(why)
            end(DIVERGED, why)
        except (MemoryError, JaxRuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise BridgeError(
                f"out of memory with {config.batch_size} sequences per step in {config.num_microbatches} microbatches; "
                "lower --batch-size, or raise --num-microbatches"
            ) from error
        write_json(outcome.to_json())
        leave()
        if outcome.stopped_by is not None:  # without waiting for a compilation in progress
            end_now(128 + outcome.stopped_by)  # as shells report a signal
        return 0

    return train


def default_config(args: Sequence[str]) -> TrainConfig:
    """Return the defaults of the flags of `gpt2 train` and `gpt2 plan`: those of the preset or of the resumed run."""
    if not set(args[:1]) & {"train", "plan"}:
        return PRESETS[DEFAULT_PRESET]
    if "--resume" in args and (out := _value(args, "--out")) is not None and is_run(Path(out)):
        stored = stored_identity(Path(out)).config
        return _printable(stored) if {"-h", "--help"} & {*args} else stored
    init_from = _value(args, "--init-from")
    name = _value(args, "--preset") or (DEFAULT_FINETUNING_PRESET if init_from else DEFAULT_PRESET)
    if name not in PRESETS:
        raise BridgeError(f"--preset {name}: must be one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    # Both fields at once, because a configuration is validated on creation.
    return replace(preset, tokenizer=TOKENIZER_OF_INIT_FROM, init_from=init_from) if init_from else preset


def _printable(config: TrainConfig) -> TrainConfig:
    """Return the configuration with control characters in strings escaped, because the help shows it as defaults."""
    values = flat(config)
    return from_flat({name: escaped(v, keep="") if isinstance(v, str) else v for name, v in values.items()})


def wants_determinism(args: Sequence[str], default: TrainConfig) -> bool:
    """Return the value of `--deterministic`, which JAX needs before the flags are parsed."""
    given = [word for word in (word.replace("_", "-") for word in args) if word in _DETERMINISTIC]
    return _DETERMINISTIC[given[-1]] if given else default.deterministic


def _value(args: Sequence[str], flag: str) -> str | None:
    """Return the value of a flag on the command line, given as `--flag VALUE` or `--flag=VALUE`."""
    for word, following in zip(args, [*args[1:], None], strict=True):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == flag:  # tyro accepts both spellings
            return value if equals else following
    return None


def run_training(
    config: TrainConfig,
    out: Path,
    *,
    default: TrainConfig | None = None,
    resume: bool = False,
    accept_changes: bool = False,
    cache: Path | None = None,
) -> Outcome:
    """Open the data and the initial checkpoint, train, and print the result.

    `default`: the defaults of the flags. Sizes in `config` that differ from it were given as flags; it is an error if
    the run has other sizes.
    """
    screen = console() if is_first() else Console(quiet=True)
    if is_first():  # before text is tokenised
        require_packages(config)
    say = screen.print
    resumes = broadcast_from_first(resume and is_run(out))
    if resume and not resumes:
        say(f"no run at {out}; starting a new one", soft_wrap=True)
    # A resumed run has its tokenizer and its sizes in RUN, and no longer needs the initial checkpoint.
    continues = broadcast_from_first(resumes and bool(steps(out)))
    origin, activation = (out, None) if continues else (config.init_from, config.source_activation)
    source = None if origin is None else bridge.load(origin, activation=activation)
    if source is not None and not continues:
        for warning in source.diagnostics:
            say(f"warning: {warning}", soft_wrap=True)
    init_from = None if config.init_from is None else source
    asked = sizes_asked_for(config, default)
    if init_from is not None:
        require_sizes(asked, init_from.config, "it is that of --init-from")
    with first_alone("opening the data"):  # the first process tokenises text for all processes
        tokenizer = chosen_tokenizer(config, source, stored_identity(out) if resumes else None)
        data = _open_data(config, tokenizer, source, cache)
    config = resolve_config(config, data, init_from)
    if config.tokenizer != "bpe":  # BPE may have fewer tokens if the text is short
        require_sizes({k: v for k, v in asked.items() if k == "vocab_size"}, config.model, "it is the tokenizer's")
    say(data.description, soft_wrap=True)
    say(f"{bridge.num_parameters(config.model):,} parameters, {config.batch_size * config.seq_len:,} tokens a step")
    outcome = train(
        config,
        out,
        data,
        init_from=init_from,
        resume=resume,
        accept_changes=accept_changes,
        console=screen,
        stop=PreemptionHandler(second=signal.SIG_DFL),
    )
    best = "" if outcome.best_val_loss is None else f", validation loss {outcome.best_val_loss:.4f}"
    say(f"exported the best step, {outcome.best_step}{best}: {outcome.export}", soft_wrap=True)
    say(f"losses: {out / 'metrics.jsonl'}, {outcome.plot}", soft_wrap=True)
    if outcome.stopped_by is not None:
        say(f"stopped by {outcome.stopped_by.name} and saved at step {outcome.step}; continue with --resume")
    return outcome


def _require_cache(cache: Path | None, inputs: Sequence[str | None]) -> None:
    """Raise if the cache is a file or an input of this command: its files would be mistaken for input."""
    if cache is None or not cache.exists():
        return
    if not cache.is_dir() or any(source and os.path.exists(source) and cache.samefile(source) for source in inputs):
        raise BridgeError(f"--cache {quoted(cache)} is a file, or an input of this command; give another directory")


def _open_data(config: TrainConfig, tokenizer: Any, source: Checkpoint | None, cache: Path | None) -> Data:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with progress(*columns) if is_first() else Progress(disable=True) as bar:
        task = bar.add_task("reading", total=None)
        data = open_data(
            config.data,
            tokenizer=tokenizer,
            vocab_size=config.model.vocab_size if source is None else source.config.vocab_size,
            validation=config.validation_data,
            validation_fraction=config.validation_fraction,
            cache=cache,
            progress=lambda doing, done, total: bar.update(task, description=doing, completed=done, total=total),
        )
    if source is not None and data.tokenizer is not None:
        require_rows(data.tokenizer, source)
    return data

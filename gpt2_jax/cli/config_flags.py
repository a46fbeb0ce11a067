"""The fields of `TrainConfig` as flags, in groups, and the preset or run that gives their defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import tyro
from tyro.conf import arg

from bridge import BridgeError, GPT2Config
from gpt2_jax.cli.dataclass_flags import flags_of
from gpt2_jax.cli.parsing import REGISTRY
from gpt2_jax.console.suggestions import did_you_mean
from gpt2_jax.lora.config import LoRAConfig
from gpt2_jax.training.config import TOKENIZER_OF_INIT_FROM, OptimizerConfig, TrainConfig, flat
from gpt2_jax.training.presets import PRESETS
from gpt2_jax.training.run.identity import has_run_json, stored_identity

DEFAULT_PRESET, DEFAULT_FINETUNING_PRESET = "nano", "finetune"

_SOURCE = ("init_from", "source_activation", "base", "drop_extra_heads")
_RECORDS = ("text_field", "prompt_field", "completion_field", "messages_field", "skip_bad_records")
_TEXT = ("data", "validation_data", "validation_fraction", "tokenizer", "special_tokens")
_DATA = (*_TEXT, *_RECORDS, "examples", *_SOURCE)
_DEVICE = ("mesh", "dtype", "scan", "remat", "attention", "vocab_multiple", "deterministic")
_REPORT = (
    "eval_every",
    "eval_batches",
    "sample_tokens",
    "sample_prompt",
    "log_every",
    "checkpoint_every",
    "keep_last",
    "tensorboard",
    "wandb",
)
_IN_OTHER_GROUPS = {"preset", "model", "optimizer", "lora", "freeze", *_DATA, *_DEVICE, *_REPORT}
_TRAINING = tuple(f.name for f in fields(TrainConfig) if f.name not in _IN_OTHER_GROUPS)

_METAVARS = {
    "init_from": "SRC",
    "base": "SRC",
    "wandb": "PROJECT",
    **dict.fromkeys(_RECORDS[:4], "NAME"),
    "mesh": "AXIS=N,...",
    "freeze": "REGEX",
    "validation_data": "[NAME=]PATH",
}


def _names(part: type) -> list[str]:
    return [f.name for f in fields(part)]


_GROUPS: Mapping[str, tuple[str, list[tuple[str, Any]]]] = {
    "data": ("What to train on, and what to start from.", flags_of(TrainConfig, _DATA, _METAVARS)),
    "training": ("Length of the run and size of a step.", flags_of(TrainConfig, _TRAINING)),
    "model": (
        "Sizes of the model. The tokenizer determines the vocabulary; with --init-from SRC, SRC determines all sizes.",
        flags_of(GPT2Config, _names(GPT2Config)),
    ),
    "optimizer": ("The update rule and its schedule.", flags_of(OptimizerConfig, _names(OptimizerConfig))),
    "parts": (
        "What to train, if not all weights: an adapter, or the parameters that are not frozen.",
        [
            *((f"lora_{name}", flag) for name, flag in flags_of(LoRAConfig, _names(LoRAConfig))),
            *flags_of(TrainConfig, ["freeze"], _METAVARS),
        ],
    ),
    "device": ("Devices, precision, and how the step is compiled.", flags_of(TrainConfig, _DEVICE, _METAVARS)),
    "report": ("Evaluations, samples, logs and checkpoints.", flags_of(TrainConfig, _REPORT, _METAVARS)),
}

if TYPE_CHECKING:
    ConfigFlags = Any
else:
    # These classes have no validation, because tyro would wrap the message. `from_flat` validates the values later.
    ConfigFlags = make_dataclass(
        "ConfigFlags",
        [
            *flags_of(TrainConfig, ["preset"]),
            *(
                (name, Annotated[make_dataclass(name, flags), arg(help=description)])
                for name, (description, flags) in _GROUPS.items()
            ),
        ],
    )
    ConfigFlags.__doc__ = "One attribute per group of flags."


def config_flags(default: TrainConfig) -> ConfigFlags:
    """Return an instance of `ConfigFlags` with the values of `default`, which become the defaults of the flags."""
    values = flat(default)
    types = get_type_hints(ConfigFlags)
    groups = {name: types[name](**{flag: values[flag] for flag, _ in flags}) for name, (_, flags) in _GROUPS.items()}
    return ConfigFlags(preset=values["preset"], **groups)


def values_of(flags: ConfigFlags) -> dict[str, Any]:
    """Return the value of every flag by its name, for `gpt2_jax.training.config.from_flat`."""
    values = {"preset": flags.preset}
    for name in _GROUPS:
        values.update(vars(getattr(flags, name)))
    return values


@dataclass(frozen=True)
class _FirstPass:
    """The flags that give all others their defaults. They are parsed first."""

    preset: str = ""
    init_from: str | None = None
    out: Path | None = None
    resume: bool = False


def default_config(verb: str, words: Sequence[str]) -> TrainConfig:
    """Return the defaults of the flags of `gpt2 train` and `gpt2 plan`: those of the preset or of the resumed run.

    Args:
        verb: for the message of a parse error.
        words: the words after the verb.
    """
    first, _ = tyro.cli(
        _FirstPass, prog=f"gpt2 {verb}", args=words, add_help=False, return_unknown_args=True, registry=REGISTRY
    )
    if first.resume and first.out is not None and has_run_json(first.out):
        return stored_identity(first.out).config
    name = first.preset or (DEFAULT_FINETUNING_PRESET if first.init_from else DEFAULT_PRESET)
    if name not in PRESETS:
        raise BridgeError(f"--preset {name}: must be one of {', '.join(PRESETS)}{did_you_mean(name, PRESETS)}")
    preset = PRESETS[name]
    if not first.init_from:
        return preset
    # Both fields at once, because a configuration is validated on creation.
    return replace(preset, tokenizer=TOKENIZER_OF_INIT_FROM, init_from=first.init_from)

"""What formats that are one file have in common.

Such a file says less than `GPT2Config` holds. Settings of the function that it cannot say have to be those that its
format implies. The rest (`TRAINING_ONLY`, and the fields that Hugging Face's config.json has beyond) is in a
`config.json` beside the file where `bridge.save` made a directory of both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from bridge.arrays import LazyTensors
from bridge.config import TRAINING_ONLY, GPT2Config, harmless_fields
from bridge.errors import ConfigError, ConversionError, bullet_list, quoted
from bridge.formats.directory import CONFIG, read_config


def with_sidecar(config: GPT2Config, file: Path, config_json: Path | None) -> tuple[GPT2Config, dict[str, Any]]:
    """`config` with what the `config.json` of `file` adds to it, and the harmless fields of that one.

    Raises `ConfigError` where the two disagree on the function.
    """
    if config_json is None:
        return config, {}
    full, read = read_config(config_json)
    unlike = [
        f"{name} is {getattr(full, name)!r} in {CONFIG}, {getattr(config, name)!r} in {quoted(file.name)}"
        for name in _function_fields()
        if _value(full, name) != _value(config, name)
    ]
    if unlike:
        raise ConfigError(
            f"{quoted(file)} and the {CONFIG} beside it describe different models; if that is another model's, move "
            "the file to a directory of its own:\n" + bullet_list(unlike)
        )
    return full, harmless_fields(read)


def require_implied(config: GPT2Config, format: str, implied: Mapping[str, Any], remedy: str = "") -> None:
    """Raise `ConfigError` naming every field that is not what the format, which cannot say it, implies."""
    unlike = [
        f"{name}={quoted(_value(config, name))}: {format} has only {value!r}"
        for name, value in implied.items()
        if _value(config, name) != value
    ]
    if unlike:
        raise ConfigError(f"{format} cannot hold this model{remedy}:\n" + bullet_list(unlike))


def require_dtypes(tensors: LazyTensors, format: str, allowed: Collection[Any]) -> None:
    """Raise `ConversionError` naming the tensors that have none of the `allowed` dtypes."""
    spelled = ", ".join(map(str, allowed))
    unlike = [
        f"{name} holds {entry.dtype}: {format} has only {spelled}"
        for name, entry in tensors.entries.items()
        if entry.dtype not in allowed
    ]
    if unlike:
        raise ConversionError(f"{format} cannot hold these tensors bit for bit:\n" + bullet_list(unlike))


def left_out(config: GPT2Config, held: GPT2Config) -> tuple[str, ...]:
    """A sentence on the settings of training in `config` that the file, which is read back as `held`, does not say."""
    unsaid = [
        f"{name}={getattr(config, name)!r}" for name in TRAINING_ONLY if _value(config, name) != _value(held, name)
    ]
    return (f"settings of training that the file has no place for: {', '.join(unsaid)}",) if unsaid else ()


def _function_fields() -> list[str]:
    return [field.name for field in fields(GPT2Config) if field.name not in TRAINING_ONLY]


def _value(config: GPT2Config, name: str) -> Any:
    """A field, with the width of the feed-forward layer spelled out."""
    return config.feed_forward_size if name == "n_inner" else getattr(config, name)

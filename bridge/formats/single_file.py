"""Shared code of the single-file formats.

Such a file stores only part of `GPT2Config`. If it cannot store a setting that affects the model's output, the setting
must have the value that the format implies. Other settings (`TRAINING_ONLY`, and further fields of Hugging Face's
config.json) are in a `config.json` beside the file if `bridge.save` wrote a directory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from bridge.config import TRAINING_ONLY, GPT2Config, config_diagnostics, harmless_fields
from bridge.errors import ConfigError, ConversionError, bullet_list, quoted
from bridge.formats.directory import CONFIG, read_config
from bridge.storage.tensors import LazyTensorMap


def with_sidecar(
    config: GPT2Config, file: Path, config_json: Path | None
) -> tuple[GPT2Config, dict[str, Any], tuple[str, ...]]:
    """Merge the `config.json` of `file` into `config`.

    Returns the result, the harmless fields of `config.json`, and its diagnostics.

    Raises `ConfigError` if the two describe different models.
    """
    if config_json is None:
        return config, {}, ()
    full, read = read_config(config_json)
    mismatched = [
        f"{name} is {getattr(full, name)!r} in {CONFIG}, but {getattr(config, name)!r} in {quoted(file.name)}"
        for name in _function_fields()
        if _value(full, name) != _value(config, name)
    ]
    if mismatched:
        raise ConfigError(
            f"{quoted(file)} and the {CONFIG} beside it describe different models; if {CONFIG} belongs to another "
            "model, move the file to a directory of its own:\n" + bullet_list(mismatched)
        )
    return full, harmless_fields(read), config_diagnostics(read)


def require_implied(config: GPT2Config, format: str, implied: Mapping[str, Any], remedy: str = "") -> None:
    """Raise a `ConfigError` that names every field whose value differs from the one that the format implies."""
    mismatched = [
        f"{name}={quoted(_value(config, name))}: {format} has only {value!r}"
        for name, value in implied.items()
        if _value(config, name) != value
    ]
    if mismatched:
        raise ConfigError(f"{format} cannot hold this model{remedy}:\n" + bullet_list(mismatched))


def require_dtypes(tensors: LazyTensorMap, format: str, allowed: Collection[Any]) -> None:
    """Raise a `ConversionError` that names the tensors whose dtype is not in `allowed`."""
    supported = ", ".join(map(str, allowed))
    mismatched = [
        f"{name} holds {entry.dtype}: {format} has only {supported}"
        for name, entry in tensors.entries.items()
        if entry.dtype not in allowed
    ]
    if mismatched:
        raise ConversionError(f"{format} cannot hold these tensors bit for bit:\n" + bullet_list(mismatched))


def settings_left_out(config: GPT2Config, stored: GPT2Config) -> tuple[str, ...]:
    """Return a sentence that lists the training settings in which `config` differs from `stored`, the file's config."""
    not_stored = [
        f"{name}={getattr(config, name)!r}" for name in TRAINING_ONLY if _value(config, name) != _value(stored, name)
    ]
    return (f"training settings that the file cannot store: {', '.join(not_stored)}",) if not_stored else ()


def _function_fields() -> list[str]:
    return [field.name for field in fields(GPT2Config) if field.name not in TRAINING_ONLY]


def _value(config: GPT2Config, name: str) -> Any:
    """Return a field. The default width of the feed-forward layer is resolved to a number."""
    return config.feed_forward_size if name == "n_inner" else getattr(config, name)

"""What formats that are one file have in common.

Such a file says less than `GPT2Config` holds. Settings of the function that it cannot say have to be those that its
format implies. The rest (`TRAINING_ONLY`, and the fields that Hugging Face's config.json has beyond) is in a
`config.json` beside the file where `bridge.save` made a directory of both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from bridge.arrays import LazyTensors
from bridge.companions import has_companion
from bridge.config import TRAINING_ONLY, GPT2Config, harmless_fields
from bridge.errors import CheckpointError, ConfigError, ConversionError, bullet_list, quoted
from bridge.formats.directory import CONFIG, read_config


def find_file(path: Path, suffixes: Collection[str], recognised: Callable[[Path], bool]) -> Path | None:
    """The file that `path` is, or the one file in the directory that it is, if its content is recognised.

    In a directory only files with one of the `suffixes` are looked at; `CheckpointError` if several are recognised.
    """
    if path.is_file():
        return path if recognised(path) else None
    if not path.is_dir():
        return None
    found = [p for p in sorted(path.iterdir()) if p.suffix in suffixes and p.is_file() and recognised(p)]
    if len(found) > 1:
        names = ", ".join(quoted(p.name) for p in found)
        raise CheckpointError(f"{quoted(path)} holds several checkpoints: {names}; name one of them")
    return found[0] if found else None


def with_sidecar(config: GPT2Config, file: Path) -> tuple[GPT2Config, dict[str, Any]]:
    """`config` with what a `config.json` beside `file` adds to it, and that one's harmless fields.

    Raises `ConfigError` where the two disagree on the function.
    """
    beside = file.parent / CONFIG
    if not has_companion(file.parent, CONFIG):
        return config, {}
    full, read = read_config(beside)
    unlike = [
        f"{name} is {getattr(full, name)!r} in {CONFIG}, {getattr(config, name)!r} in {file.name}"
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

"""PEFT's `adapter_config.json`: which fields are read, and which kinds of LoRA are supported.

Source: https://github.com/huggingface/peft, tuners/lora/config.py (version 0.21).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from bridge.errors import ConfigError, bullet_list, quoted
from bridge.storage.companions import read_json_companion

FILE = "adapter_config.json"

_MUST_BE: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # "pissa", "olora", "corda", "mica", "lora_ga" and "loftq" change the base's weights before the training.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "ensure_weight_tying": (False,),
    **dict.fromkeys(
        (
            *("layer_replication", "megatron_config", "trainable_token_indices", "target_parameters"),
            *("alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config"),
            "use_bdlora",
        ),
        (None,),
    ),
}
"""Fields that determine the function of the adapter -> the values that are supported."""
_IGNORED = (
    *("peft_version", "task_type", "inference_mode", "revision", "auto_mapping", "runtime_config", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
    *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
)
"""Fields that do not affect the function. The names of the tensors determine which modules are adapted. The kind of a
module determines its layout, so `fan_in_fan_out` is redundant."""
_EMPTY: tuple[Any, ...] = (None, False, "", [], {})
"""Values that disable the feature of an unknown field."""

_MOST_NUMBER = 2**31 - 1
_PATTERN = re.compile(r"\^?(?:(?:[\w.-]|\\[.d]|\[[\w-]+\])[*+]?){1,256}\$?")
"""A simple pattern. `_complex_patterns` allows at most one quantifier, so that matching takes quadratic time."""
_Compiled: TypeAlias = list[tuple[re.Pattern[str], Any]]
_MOST_NAMES = 2**10
"""Limit on the entries of a list or an object."""
_MOST_COMPARISONS = 2**17
"""Limit on modules times patterns. GPT-2 XL with patterns for each of its 192 projections needs 74,000."""


@dataclass(frozen=True)
class PeftConfig:
    """The fields of an `adapter_config.json` that determine the function of a LoRA adapter."""

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] | None = None
    """Pattern of module names -> rank. The first pattern that matches a module counts."""
    alpha_pattern: Mapping[str, float] | None = None
    modules_to_save: tuple[str, ...] | None = None
    """Suffixes of the names of modules that the adapter replaces as a whole."""
    base_model_name_or_path: str | None = None

    def rank(self, module: str) -> int:
        """Return the rank of a module, named as in the base model."""
        return _first_match(self._ranks, module, self.r)

    def alpha(self, module: str) -> float:
        """Return alpha of a module."""
        return _first_match(self._alphas, module, self.lora_alpha)

    @cached_property
    def _ranks(self) -> _Compiled:
        return _compiled(self.rank_pattern or {})

    @cached_property
    def _alphas(self) -> _Compiled:
        return _compiled(self.alpha_pattern or {})

    def saves(self, module: str) -> bool:
        """Whether `modules_to_save` names the module."""
        return module.endswith(self.modules_to_save or ())

    def require_few_comparisons(self, modules: int) -> None:
        """Raise `ConfigError` if matching the patterns against this number of modules would take too long."""
        patterns = len(self.rank_pattern or {}) + len(self.alpha_pattern or {})
        if modules * patterns > _MOST_COMPARISONS:
            raise ConfigError(f"{FILE} has too many patterns of ranks and alphas: {patterns} for {modules} modules")


def read_peft_config(directory: Path) -> PeftConfig:
    """Read and validate the file. Raises a `ConfigError` that names every malformed or unsupported field."""
    fields = read_json_companion(directory, FILE)
    if problems := [*_unsupported(fields), *_malformed(fields)] or [*_complex_patterns(fields)]:
        raise ConfigError(f"{quoted(directory / FILE)}:\n" + bullet_list(problems))
    values = {name: fields[name] for name in _VALID if name in fields}
    if (saved := fields.get("modules_to_save")) is not None:
        values["modules_to_save"] = tuple(saved)
    return PeftConfig(**values)


def _unsupported(fields: Mapping[str, Any]) -> Iterator[str]:
    for name, value in fields.items():
        if name in _MUST_BE:
            if not any(type(value) is type(allowed) and value == allowed for allowed in _MUST_BE[name]):
                listed = " or ".join("null" if allowed is None else repr(allowed) for allowed in _MUST_BE[name])
                yield f"{name}={quoted(value)}: not supported; it must be {listed} (or merge the adapter with PEFT)"
        elif name not in _VALID and name not in _IGNORED and value not in _EMPTY:
            yield f"{quoted(name)}={quoted(value)}: unknown; remove it if it does not change what the adapter computes"
    for name in ("peft_type", "r", "lora_alpha"):
        if name not in fields:
            yield f"{name} is missing"


def _malformed(fields: Mapping[str, Any]) -> Iterator[str]:
    for name, (is_valid, expected) in _VALID.items():
        if name in fields and not is_valid(fields[name]):
            yield f"{name}={quoted(fields[name])}: must be {expected}"


def _complex_patterns(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield patterns that are not simple. PEFT takes any regular expression; some take exponential time to match."""
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in fields.get(name) or ():
            if not _PATTERN.fullmatch(pattern) or sum(map(pattern.count, "*+")) > 1 or not _compiles(pattern):
                yield f"{name}: the pattern {quoted(pattern)} is too complex; write the names of the modules"


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _MOST_NUMBER


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= _MOST_NUMBER


def _is_bool(value: Any) -> bool:
    return type(value) is bool


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _are_names(value: Any) -> bool:
    if not isinstance(value, list):
        return value is None
    return len(value) <= _MOST_NAMES and all(isinstance(name, str) and name for name in value)


def _maps_to(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def are_valid(value: Any) -> bool:
        if not isinstance(value, dict):
            return value is None
        return len(value) <= _MOST_NAMES and all(map(is_valid, value.values()))

    return are_valid


_VALID: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a positive integer"),
    "lora_alpha": (_is_alpha, "a number"),
    "use_rslora": (_is_bool, "true or false"),
    "rank_pattern": (_maps_to(_is_rank), f"an object of at most {_MOST_NAMES} positive integers"),
    "alpha_pattern": (_maps_to(_is_alpha), f"an object of at most {_MOST_NAMES} numbers"),
    "modules_to_save": (_are_names, f"a list of at most {_MOST_NAMES} names"),
    "base_model_name_or_path": (_is_text, "a name or a path"),
}
"""Fields that are read -> a function that checks a value, and a description of the valid values."""


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _compiled(patterns: Mapping[str, Any]) -> _Compiled:
    """Compile patterns of names or of their ends, as PEFT's `get_pattern_key` matches them.

    The cache of `re` holds fewer patterns than a file may have.
    """
    return [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()]


def _first_match(patterns: _Compiled, module: str, default: Any) -> Any:
    return next((value for pattern, value in patterns if pattern.match(module)), default)

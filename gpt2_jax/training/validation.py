"""Checks of single configuration fields: their types, their choices and their ranges.

`gpt2_jax.training.config` calls them when a configuration is created, and checks the combinations of fields.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from bridge.errors import quoted

_TYPE_NAMES = {int: "a 64-bit integer", float: "a number", bool: "true or false", NoneType: "none"}


@dataclass(frozen=True)
class Range:
    """The values that a number may have."""

    contains: Callable[[float], bool]
    """Called with finite numbers only."""
    text: str
    """The requirement in words, for the message."""


AT_LEAST_ONE = Range(lambda value: value >= 1, "must be at least 1")
POSITIVE = Range(lambda value: value > 0, "must be positive")
NOT_NEGATIVE = Range(lambda value: value >= 0, "must not be negative")
BETWEEN_0_AND_1 = Range(lambda value: 0 < value < 1, "must be between 0 and 1")
DECAY_RATE = Range(lambda value: 0 <= value < 1, "must be at least 0 and below 1")
FRACTION = Range(lambda value: 0 < value <= 1, "must be above 0 and at most 1")
UINT32 = Range(lambda value: 0 <= value < 2**32, f"must be between 0 and {2**32 - 1}")

RANGES: dict[str, Range] = {
    # TrainConfig
    "max_steps": AT_LEAST_ONE,
    "batch_size": AT_LEAST_ONE,
    "seq_len": AT_LEAST_ONE,
    "num_microbatches": AT_LEAST_ONE,
    "eval_every": AT_LEAST_ONE,
    "log_every": AT_LEAST_ONE,
    "checkpoint_every": AT_LEAST_ONE,
    "vocab_multiple": AT_LEAST_ONE,
    "keep_last": AT_LEAST_ONE,
    "eval_batches": AT_LEAST_ONE,
    "validation_fraction": BETWEEN_0_AND_1,
    "seed": UINT32,
    "sample_tokens": NOT_NEGATIVE,
    "ema_decay": BETWEEN_0_AND_1,
    "early_stopping": AT_LEAST_ONE,
    # OptimizerConfig
    "learning_rate": POSITIVE,
    "epsilon": POSITIVE,
    "muon_learning_rate": POSITIVE,
    "min_learning_rate": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "muon_weight_decay": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "beta1": DECAY_RATE,
    "beta2": DECAY_RATE,
    "muon_momentum": DECAY_RATE,
    "decay_fraction": FRACTION,
    "layer_decay": FRACTION,
    "max_grad_norm": Range(POSITIVE.contains, "must be positive, or None"),
    # LoRAConfig
    "rank": NOT_NEGATIVE,
    "alpha": POSITIVE,
    "dropout": DECAY_RATE,
}
"""The ranges of all numeric fields. None, where a field allows it, is always in range."""

_LONGEST_PATTERN = 1000
_WAYS_OF_REPETITION = 25
"""A repetition can end at any character of a path. The longest, `h_100/attn/c_attn/kernel`, has 24."""
_MOST_STEPS = 3_000_000
"""Limit on the product of a pattern's length and the ways in which it can match. Three repetitions in a sequence are
below it, and four are not."""
_TOKENS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?|\)[*+?{]|[()|*+?{]", re.DOTALL)
"""Escaped characters and classes, which the caller ignores, and the syntax of groups and repetitions."""
_STEP_COUNTS = frozenset({"max_steps", "eval_every", "log_every", "checkpoint_every", "warmup_steps", "decay_steps"})


def type_problems(part: Any) -> Iterator[str]:
    """Yield the fields of a dataclass that do not have their declared type.

    A bool is not an int, an int is a float, and text must not contain NUL.
    """
    for name, hint in _type_hints(part.__class__).items():
        value, allowed = getattr(part, name), get_args(hint) if isinstance(hint, UnionType) else (hint,)
        if not any(_has_type(value, one) for one in allowed):
            yield f"{name}={_shown(value)}: must be {' or '.join(_TYPE_NAMES.get(one, 'text') for one in allowed)}"
        elif any("\0" in text for text in _texts(value)):
            yield f"{name}={_shown(value)}: must not have a NUL character"


def choice_problems(part: Any) -> Iterator[str]:
    """Yield the fields declared as `Literal` whose value is not one of the choices."""
    for name, hint in _type_hints(part.__class__).items():
        if get_origin(hint) is Literal and getattr(part, name) not in get_args(hint):
            yield f"{name}={_shown(getattr(part, name))}: must be one of {', '.join(get_args(hint))}"


def range_problems(part: Any) -> Iterator[str]:
    """Yield the numeric fields that are out of range."""
    for name, value in vars(part).items():
        allowed = RANGES.get(name)
        if allowed is not None and value is not None and not (math.isfinite(value) and allowed.contains(value)):
            yield f"{name}={value}: {allowed.text}"
        if type(value) is int and value >= 2**31 and name != "seed":
            reason = ", as steps are counted in 32 bits" if name in _STEP_COUNTS else ""
            yield f"{name}={value}: must be below {2**31}{reason}"


_type_hints: Callable[[Any], dict[str, Any]] = functools.cache(get_type_hints)
"""The hints of a class, which take a millisecond to evaluate."""


def pattern_problem(pattern: str) -> str | None:
    """Return why a regular expression is not accepted, or None.

    A run.json may come from somebody else, and some expressions take exponential time. Accepted are expressions that
    can match a path in few ways, with groups that are neither repeated nor of the kind `(?...)`.
    """
    if len(pattern) > _LONGEST_PATTERN:
        return f"must have at most {_LONGEST_PATTERN} characters"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # about syntax that a later version of Python reads differently
            re.compile(pattern)
    except (re.error, Warning, OverflowError, RecursionError) as error:
        return f"is not a regular expression: {error}"
    if (ways := _num_ways(pattern)) is None:
        return "is too complex; use no repeated groups and no (?"
    if ways * len(pattern) > _MOST_STEPS:
        return "is too complex; use fewer of * + ? { in each alternative, and fewer alternatives in groups"
    return None


def _num_ways(pattern: str) -> int | None:
    """Return a bound of the ways in which a valid pattern can match a path, or None for an unsupported group.

    A matcher that backtracks tries each of them in the worst case. The ways of a sequence are multiplied, and those of
    alternatives are added.
    """
    groups = [[1]]  # for the pattern and each open group, the ways of every alternative so far
    for token in _TOKENS.findall(pattern):
        if token[0] == ")":
            ways = sum(groups.pop())
            groups[-1][-1] *= ways
        if len(token) == 2 and token[0] in "()":
            return None
        if token == "(":
            groups.append([1])
        elif token == "|":
            groups[-1].append(1)
        elif token in "*+?{":
            groups[-1][-1] *= 2 if token == "?" else _WAYS_OF_REPETITION
    return sum(groups[0])


def _has_type(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return isinstance(value, str)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if type(value) is int and hint in (int, float):
        return -(2**63) <= value < 2**63
    if dataclasses.is_dataclass(hint):
        return isinstance(value, hint)  # type: ignore[arg-type]
    return type(value) is hint


def _texts(value: Any) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else (value,) if isinstance(value, str) else ()


def _shown(value: Any) -> str:
    """Format a value for a message: text quoted and truncated, a list or an object as its type."""
    if isinstance(value, tuple):
        return quoted([*value])
    if isinstance(value, list | dict):
        return type(value).__name__
    return quoted(value) if isinstance(value, str) else quoted(value)[1:-1]

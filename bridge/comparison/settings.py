"""The comparison of configurations, generation settings and chat templates: named values that differ."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from bridge.checkpoint import Checkpoint
from bridge.config import TRAINING_ONLY, GPT2Config
from bridge.generation.config import NEUTRAL, GenerationConfig
from bridge.generation.defaults import SAMPLING_DEFAULTS, GenerationDefaults, generation_defaults
from bridge.tokenizers.chat.templates import read_chat_templates
from bridge.tokenizers.tokenizer import Tokenizer

Effect = Literal["function", "tensors", "rounding", "training", "text", "state", "none"]
"""What a difference changes.

`function`: the logits. `tensors`: names or shapes of tensors, whose comparison decides. `rounding`: only rounding
errors. `training`: only training. `text`: the text that is generated or read. `state`: a continued training. `none`:
nothing that this project or transformers' GPT-2 computes.
"""

MATTERS = ("function", "text", "state")
"""The effects that make two checkpoints different. The comparison of tensors covers `tensors`."""


@dataclass(frozen=True)
class Difference:
    """A named value that differs. None: this side does not have it."""

    name: str
    a: Any
    b: Any
    effect: Effect

    @property
    def matters(self) -> bool:
        return self.effect in MATTERS


Differences = tuple[Difference, ...]

_OF_TENSORS = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_inner", "tie_word_embeddings", "bias")

_SAME_FORMULA = (
    {"gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate"},  # gelu_fast rounds a constant to ten digits
    {"gelu", "gelu_python"},
    {"silu", "swish"},
)


def compare_configs(a: GPT2Config, b: GPT2Config) -> Differences:
    """Return the fields that differ, and what each of them changes."""
    pairs = ((f.name, getattr(a, f.name), getattr(b, f.name)) for f in fields(GPT2Config))
    return tuple(Difference(name, x, y, _effect(name, a, b)) for name, x, y in pairs if x != y)


def _effect(name: str, a: GPT2Config, b: GPT2Config) -> Effect:
    if name in TRAINING_ONLY:
        return "training"
    if name == "n_inner" and a.feed_forward_size == b.feed_forward_size:
        return "none"
    if name in _OF_TENSORS:
        return "tensors"
    is_alias = any({a.activation_function, b.activation_function} <= names for names in _SAME_FORMULA)
    if name == "reorder_and_upcast_attn" or (name == "activation_function" and is_alias):
        return "rounding"
    return "function"


def compare_fields(
    a: Mapping[str, Any], b: Mapping[str, Any], effect: Effect, defaults: Mapping[str, Any] | None = None
) -> Differences:
    """Return the entries of two mappings that differ.

    Args:
        effect: what each of these differences changes.
        defaults: the values of missing entries. Without one, the value is None.
    """
    defaults = defaults or {}
    values = ((name, *(side.get(name, defaults.get(name)) for side in (a, b))) for name in dict.fromkeys((*a, *b)))
    return tuple(Difference(name, x, y, effect) for name, x, y in values if x != y)


_GENERATION_DEFAULTS: Mapping[str, Any] = {
    **{f.name: f.default for f in fields(GenerationConfig) if f.name != "max_new_tokens"},
    **NEUTRAL,
    **SAMPLING_DEFAULTS,
    "do_sample": False,
}
"""The values of settings that no file has."""


def compare_generation(a: Checkpoint, b: Checkpoint, tokenizers: tuple[Tokenizer, Tokenizer] | None) -> Differences:
    """Return the settings with which the checkpoints generate and that differ. A missing setting has its default.

    Args:
        tokenizers: the tokenizers of both, or None if only one or neither has one. They end a text if no file does.

    Raises `CheckpointError` for a damaged file or an invalid setting.
    """
    of_a, of_b = tokenizers or (None, None)
    first, second = generation_defaults(a, of_a), generation_defaults(b, of_b)
    ends = compare_fields(_ends(first), _ends(second), "text")
    settings = compare_fields(first.settings, second.settings, "text", _GENERATION_DEFAULTS)
    ignored = compare_fields(_not_applied(first), _not_applied(second), "none")
    return (*ends, *settings, *ignored)


def _ends(defaults: GenerationDefaults) -> dict[str, list[int]]:
    return {"eos_token_id": sorted(defaults.eos_token_ids)}


def _not_applied(defaults: GenerationDefaults) -> dict[str, str]:
    """Return name -> value and reason for each setting that has no effect, without the name of its file."""
    sentences = (sentence.partition(": ")[2].partition(": ") for sentence in defaults.not_applied)
    return {name: reason for name, _, reason in sentences}


def compare_chat_templates(a: Checkpoint, b: Checkpoint) -> Differences:
    """Return the chat templates that differ, by name. The value of a template is its length and its SHA-256."""
    return compare_fields(dict(_chat_templates(a)), dict(_chat_templates(b)), "text")


def _chat_templates(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    templates = {} if checkpoint.path is None else read_chat_templates(checkpoint.path)
    for name, template in templates.items():
        digest = hashlib.sha256(template.text.encode(errors="surrogatepass")).hexdigest()
        yield name, f"{len(template.text)} characters, sha256 {digest[:16]}"

"""The generation settings of a checkpoint, applied as transformers' `generate` applies them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from bridge.checkpoint import GENERATION_CONFIG, Checkpoint
from bridge.config import GPT2Config
from bridge.errors import BridgeError, CheckpointError, bullet_list, quoted
from bridge.generation.checks import problems
from bridge.generation.config import GREEDY_BELOW, SAMPLING_FIELDS, GenerationConfig
from bridge.generation.settings import ID_FIELDS, SETTINGS, unsupported, within_vocabulary
from bridge.storage.companions import has_companion, read_json_companion
from bridge.tokenizers.tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 20
"""transformers' default for the number of new tokens."""

SAMPLING_DEFAULTS: Mapping[str, Any] = {"temperature": 1.0, "top_k": 50}
"""transformers' defaults for sampling. All other processors are off by default, and transformers samples only if
`do_sample` is true."""

_FIELDS = frozenset(f.name for f in fields(GenerationConfig))


@dataclass(frozen=True)
class GenerationDefaults:
    """How a checkpoint generates by default."""

    model: GPT2Config
    settings: Mapping[str, Any]
    """The settings that the checkpoint has and that generation supports, under transformers' names."""
    source: str | None
    """The file with the settings: `generation_config.json` or `config.json`. None if no file has any."""
    eos_token_ids: tuple[int, ...]
    """The tokens that end a text."""
    eos_source: str | None
    """The source of `eos_token_ids`: one of these files, or "tokenizer". None if no source names a token."""
    not_applied: tuple[str, ...] = ()
    """One sentence for each setting that is not applied. It begins with the name of the file."""
    end_note: str | None = None
    """A sentence, if transformers would not end a text at these tokens."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Everything in which generation differs from transformers' with the same files."""
        return self.not_applied if self.end_note is None else (*self.not_applied, self.end_note)

    def max_new_tokens(self, prompt_length: int) -> int | None:
        """Return the checkpoint's limit for new tokens, or None if it has none.

        Raises `BridgeError` if its `max_length` leaves no room after the prompt.
        """
        if (limit := self.settings.get("max_new_tokens")) is not None:
            return int(limit)
        if (total := self.settings.get("max_length")) is None:
            return None
        if total <= prompt_length:
            raise BridgeError(
                f"{self.source}: max_length={total} includes the prompt, which has {prompt_length} tokens; set "
                "max_new_tokens (--max-new-tokens)"
            )
        return int(total - prompt_length)

    def config(
        self, prompt_length: int = 0, *, new_tokens: int = DEFAULT_NEW_TOKENS, **overrides: Any
    ) -> GenerationConfig:
        """Return the configuration that transformers' `generate` would use.

        Args:
            prompt_length: tokens of the longest prompt, which `max_length` and `min_length` include.
            new_tokens: the number of new tokens if the checkpoint has no limit. Without `slide`, at most as many as the
                positions hold.
            **overrides: fields of `GenerationConfig`, and `do_sample`. A `temperature` above 0 implies `do_sample`.

        Raises:
            BridgeError: the checkpoint's `max_length` leaves no room after the prompt.
        """
        samples, num_beams = self._samples(overrides), overrides.get("num_beams", self.settings.get("num_beams", 1))
        own = {name: value for name, value in self.settings.items() if name in _FIELDS}
        if samples:
            own = {**SAMPLING_DEFAULTS, **own}
            own.pop("num_beams", None)  # beam search does not sample
        else:
            own = {name: value for name, value in own.items() if name not in SAMPLING_FIELDS} | {"temperature": 0.0}
            if num_beams == 1:
                own.pop("num_return_sequences", None)
        if "min_new_tokens" not in own and "min_length" in self.settings:
            own["min_new_tokens"] = max(0, self.settings["min_length"] - prompt_length)
        if "max_new_tokens" not in overrides:
            room = new_tokens if overrides.get("slide") else max(1, self.model.n_positions - prompt_length)
            own["max_new_tokens"] = self.max_new_tokens(prompt_length) or min(new_tokens, room)
        own["eos_token_id"] = self.eos_token_ids
        overrides = {name: value for name, value in overrides.items() if name != "do_sample"}
        return GenerationConfig(**{**own, **overrides})

    def _samples(self, overrides: Mapping[str, Any]) -> bool:
        if "do_sample" in overrides:
            return bool(overrides["do_sample"])
        if "temperature" in overrides:
            return bool(overrides["temperature"] >= GREEDY_BELOW)
        return bool(self.settings.get("do_sample", False)) and overrides.get("num_beams", 1) == 1


def generation_defaults(checkpoint: Checkpoint, tokenizer: Tokenizer | None = None) -> GenerationDefaults:
    """Return how a checkpoint generates by default.

    The settings are those of `generation_config.json` beside the weights or, without this file, of `config.json`, as in
    transformers. `eos_token_id` is taken from the first file that has it. If neither has it, the end-of-sequence token
    of `tokenizer` ends a text. transformers does not end a text if `generation_config.json` exists without an
    `eos_token_id`, or if neither file has one.

    Args:
        tokenizer: the checkpoint's tokenizer.

    Raises:
        CheckpointError: a file is damaged, or a setting has an invalid value. The message names it.
    """
    stored = _stored_settings(checkpoint)
    source = next(iter(stored))
    settings, notes = _validated(stored[source], checkpoint.config, source)
    others = unsupported(stored[source])
    notes += [f"{source}: {quoted(name)}={quoted(value)}: not supported" for name, value in others.items()]
    if settings.get("do_sample") and settings.get("num_beams", 1) > 1:
        beams = settings["num_beams"]
        notes.append(f"{source}: num_beams={beams}: beam search does not sample, so sampling uses one beam")
    eos_source = next((name for name, found in stored.items() if "eos_token_id" in found), None)
    if eos_source is None:
        ids = () if tokenizer is None else tokenizer.eos_token_ids
        eos_source = "tokenizer" if ids else None
    else:
        named_end = {"eos_token_id": stored[eos_source]["eos_token_id"]}
        found, eos_notes = _validated(named_end, checkpoint.config, eos_source)
        ids = found.get("eos_token_id", ())
        notes += [note for note in eos_notes if note not in notes]
    end_note = None
    if ids and source == GENERATION_CONFIG != eos_source:
        other = f"the {eos_source}" if eos_source == "tokenizer" else eos_source
        end_note = f"{source}: no eos_token_id, so a text ends at that of {other}; transformers would not end it"
    settings.pop("eos_token_id", None)
    has_settings = bool(settings or notes) or source == GENERATION_CONFIG
    return GenerationDefaults(
        checkpoint.config, settings, source if has_settings else None, ids, eos_source, tuple(notes), end_note
    )


def _stored_settings(checkpoint: Checkpoint) -> dict[str, Mapping[str, Any]]:
    """Return file -> its settings, in the order in which the files are looked up."""
    stored: dict[str, Mapping[str, Any]] = {}
    directory = checkpoint.settings_path
    if directory is not None and has_companion(directory, GENERATION_CONFIG):
        stored[GENERATION_CONFIG] = read_json_companion(directory, GENERATION_CONFIG)
    named = {name: value for name, value in checkpoint.extra.items() if name in SETTINGS}
    return stored | {"config.json": {**named, **unsupported(checkpoint.extra, only_known=True)}}


def _validated(stored: Mapping[str, Any], model: GPT2Config, source: str) -> tuple[dict[str, Any], list[str]]:
    """Return the supported settings of a file with values of the right types, and notes on ids that were dropped.

    Raises a `CheckpointError` that names every invalid setting.
    """
    settings, wrong, notes = {}, [], []
    for name, kind in SETTINGS.items():
        if (value := stored.get(name)) is None:
            continue
        try:
            settings[name] = kind(value)
        except ValueError as problem:
            wrong.append(f"{name}={quoted(value)}: {problem}")
            continue
        if name in ID_FIELDS:
            kept, dropped = within_vocabulary(name, settings.pop(name), model.vocab_size)
            if dropped:
                outside = f"{dropped} of its entries are outside the vocabulary of {model.vocab_size}"
                notes.append(f"{source}: {name}: {outside}")
            if kept is not None:
                settings[name] = kept
    if not wrong:
        known = GenerationDefaults(model, settings, source, settings.get("eos_token_id", ()), source)
        wrong = problems(known.config(max_new_tokens=1), model, [])
    if wrong:
        raise CheckpointError(f"{source} has invalid settings; correct or remove them:\n" + bullet_list(wrong))
    return settings, notes

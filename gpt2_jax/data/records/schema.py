"""Which fields of a record are trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from bridge.errors import quoted
from gpt2_jax.data.errors import DataError

Kind = Literal["text", "prompt and completion", "messages"]

NAMES: dict[Kind, tuple[str, ...]] = {
    "text": ("text",),
    "prompt and completion": ("prompt", "completion"),
    "messages": ("messages",),
}
"""The kinds of records, with the names that their fields have unless `RecordOptions` gives others."""

_SHOWN = 20


@dataclass(frozen=True)
class RecordOptions:
    """How records are read. The defaults suit records with the usual names of fields."""

    text_field: str | None = None
    """The field with the text."""
    prompt_field: str | None = None
    """The field with the prompt; the default is `prompt`, if another field of this kind is named."""
    completion_field: str | None = None
    """The field with the completion; the default is `completion`, if another field of this kind is named."""
    messages_field: str | None = None
    """The field with the messages of a conversation."""
    skip_bad: bool = False
    """Leave out and count the records that cannot be used. By default the first one is an error."""
    max_tokens: int | None = None
    """The largest number of tokens of an example with a completion. None: no limit. Text has no limit."""

    @property
    def is_given(self) -> bool:
        """Whether an option that only records have differs from its default."""
        return self.skip_bad or bool(self.named())

    def named(self) -> dict[Kind, tuple[str, ...]]:
        """Return the kinds of which at least one field is named, with all of their fields."""
        given: dict[Kind, tuple[str | None, ...]] = {
            "text": (self.text_field,),
            "prompt and completion": (self.prompt_field, self.completion_field),
            "messages": (self.messages_field,),
        }
        return {
            kind: tuple(name or usual for name, usual in zip(names, NAMES[kind], strict=True))
            for kind, names in given.items()
            if any(names)
        }


@dataclass(frozen=True)
class Schema:
    """The kind of all records of a source, and the fields that it uses."""

    kind: Kind
    fields: tuple[str, ...]

    @property
    def masked(self) -> bool:
        """Whether some tokens do not count in the loss: those of prompts, and of messages that are not the model's."""
        return self.kind != "text"

    @property
    def key(self) -> str:
        """The part of a cache key that distinguishes schemas."""
        return json.dumps([self.kind, *self.fields])


def choose_schema(columns: Sequence[str], options: RecordOptions, where: str) -> Schema:
    """Return the schema of records with these fields.

    Args:
        columns: the names of the fields of the first record, or of the columns.
        where: the file, for messages.

    Raises:
        DataError: no kind of record fits, or several do and `options` names none.

    >>> choose_schema(["id", "text"], RecordOptions(), "train.jsonl")
    Schema(kind='text', fields=('text',))
    """
    named = options.named()
    if len(named) > 1:
        raise DataError(f"the fields name several kinds of records: {_kinds(named)}; name those of one kind")
    if named:
        [(kind, fields)] = named.items()
        if missing := [name for name in fields if name not in columns]:
            raise DataError(f"{where} has no field {quoted(missing[0])}; {_fields(columns)}")
        return Schema(kind, fields)
    fits = [kind for kind, names in NAMES.items() if set(names) <= set(columns)]
    if len(fits) > 1:
        raise DataError(
            f"{where} has the fields of several kinds of records: {_kinds(fits)}; choose one with --text-field, "
            f"--completion-field or --messages-field; {_fields(columns)}"
        )
    if not fits:
        raise DataError(
            f"{where} has neither text, nor prompt and completion, nor messages; {_fields(columns)}; name those to "
            "train on with --text-field, --prompt-field and --completion-field, or --messages-field"
        )
    return Schema(fits[0], NAMES[fits[0]])


def _kinds(kinds: Iterable[Kind]) -> str:
    return "; ".join(kinds)


def _fields(columns: Sequence[str]) -> str:
    shown = ", ".join(map(quoted, columns[:_SHOWN])) or "none"
    return f"its fields are {shown}" + (f" and {len(columns) - _SHOWN} more" if len(columns) > _SHOWN else "")

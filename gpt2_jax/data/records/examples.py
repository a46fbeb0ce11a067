"""The text of a record, validated and split into the parts that count in the loss and those that do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bridge.errors import quoted
from gpt2_jax.data.records.rows import BadRecord, Row
from gpt2_jax.data.records.schema import Schema

Message = Mapping[str, Any]
Example = str | tuple[str, str] | list[Message]
"""A text, a prompt and its completion, or the messages of a conversation."""

EMPTY_TEXT = "with an empty text"
"""The reason for leaving out an empty text, which is not an error: data sets use it to separate sections."""

MOST_TURNS = 256
"""Limit on the assistant's messages of one conversation. The chat template renders its beginning twice for each."""
MOST_RENDERED = 2**24
"""Limit on the characters of a conversation times its messages of the assistant."""


def example_of(row: Row, schema: Schema) -> Example:
    """Return the example in a row. Raises `BadRecord` if the row has none."""
    if isinstance(row.values, BadRecord):
        raise row.values
    found = [_value(row.values, name) for name in schema.fields]
    if schema.kind == "messages":
        return _messages(found[0], schema.fields[0])
    texts = [_text(value, name) for value, name in zip(found, schema.fields, strict=True)]
    if schema.kind == "text":
        if not texts[0]:
            raise BadRecord(EMPTY_TEXT)
        return texts[0]
    if not texts[1]:
        raise BadRecord("with an empty completion", f"the field {quoted(schema.fields[1])} is empty")
    return texts[0], texts[1]


def work_of(example: Example) -> int:
    """Return the number of characters that are encoded or rendered for an example."""
    replies = sum(message["role"] == "assistant" for message in example) if isinstance(example, list) else 1
    return replies * sum(map(len, texts_in(example)))


def texts_in(example: Example) -> Iterator[str]:
    """Yield all text of an example, for training a tokenizer."""
    if isinstance(example, str):
        yield example
    elif isinstance(example, tuple):
        yield from example
    else:
        yield from (message["content"] for message in example)


def _value(values: Mapping[str, Any], name: str) -> Any:
    try:
        return values[name]
    except KeyError:
        raise BadRecord("without a field", f"has no field {quoted(name)}") from None


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise BadRecord("with a field of another type", f"the field {quoted(name)} is {kind} and not text")
    if "\0" in value:
        raise BadRecord(
            "with a NUL character", f"the field {quoted(name)} has a NUL character, which text does not have"
        )
    return value


def _messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise BadRecord("with a field of another type", f"the field {quoted(name)} is not a list of messages")
    for k, message in enumerate(value):
        for field in ("role", "content"):
            _text(_value(message, field), f"{name}[{k}].{field}")
    turns = [k for k, message in enumerate(value) if message["role"] == "assistant"]
    if not turns:
        raise BadRecord("without a message of the assistant", f"{quoted(name)} has no message of the assistant")
    if turns[0] == 0:
        raise BadRecord(
            "that begin with the assistant", f"{quoted(name)} begins with the assistant; nothing precedes it"
        )
    if len(turns) > MOST_TURNS:
        raise BadRecord(
            "with too many messages", f"{quoted(name)} has more than {MOST_TURNS} messages of the assistant"
        )
    if work_of(value) > MOST_RENDERED:
        raise BadRecord("with too many messages", f"{quoted(name)} has too much text for {len(turns)} replies")
    if empty := next((k for k in turns if not value[k]["content"]), 0):
        raise BadRecord("with an empty completion", f"{quoted(f'{name}[{empty}].content')} is empty")
    return value

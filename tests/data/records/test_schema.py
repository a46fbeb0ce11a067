"""Which fields of records are used, and what is refused."""

from __future__ import annotations

import pytest

from gpt2_jax.data import DataError, RecordOptions
from gpt2_jax.data.records.schema import Schema, choose_schema

BOTH = ("prompt", "completion")


@pytest.mark.parametrize(
    ("columns", "options", "kind", "fields"),
    [
        (["id", "text"], {}, "text", ("text",)),
        (["completion", "prompt"], {}, "prompt and completion", BOTH),
        (["messages", "prompt"], {}, "messages", ("messages",)),
        (["body", "text"], {"text_field": "body"}, "text", ("body",)),
        (["q", "completion", "text"], {"prompt_field": "q"}, "prompt and completion", ("q", "completion")),
        (["prompt", "a"], {"completion_field": "a"}, "prompt and completion", ("prompt", "a")),
        (["text", "chat"], {"messages_field": "chat"}, "messages", ("chat",)),
        (["text", "messages"], {"text_field": "text"}, "text", ("text",)),
    ],
)
def test_the_fields_decide(columns: list[str], options: dict[str, str], kind: str, fields: tuple[str, ...]) -> None:
    schema = choose_schema(columns, RecordOptions(**options), "'a.jsonl'")  # type: ignore[arg-type]
    assert (schema.kind, schema.fields, schema.masked) == (kind, fields, kind != "text")


@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        (
            ["input", "output"],
            {},
            "neither text, nor prompt and completion, nor messages; its fields are 'input', ",
        ),
        ([], {}, "its fields are none"),
        (["text", "messages"], {}, "has the fields of several kinds of records: text; messages; choose one"),
        (["text"], {"text_field": "body"}, "'a.jsonl' has no field 'body'; its fields are 'text'"),
        (["prompt"], {"prompt_field": "prompt"}, "has no field 'completion'"),
        (["a"], {"text_field": "a", "messages_field": "a"}, "name several kinds of records: text; messages"),
        ([f"c{i}" for i in range(25)], {}, "'c19' and 5 more"),
    ],
)
def test_what_fits_no_kind_or_several_is_refused(columns: list[str], options: dict[str, str], expected: str) -> None:
    with pytest.raises(DataError) as caught:
        choose_schema(columns, RecordOptions(**options), "'a.jsonl'")  # type: ignore[arg-type]
    assert expected in str(caught.value)


def test_the_key_distinguishes_kinds_and_fields() -> None:
    schemas = [Schema("text", ("text",)), Schema("text", ("messages",)), Schema("messages", ("messages",))]
    assert len({schema.key for schema in schemas}) == 3

"""Records that cannot be used, and files that are not what their names say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.chats import CHATML, write_chat_tokenizer
from support.refusals import within_budget

from bridge import BridgeError
from gpt2_jax.data import Data, DataError, RecordOptions, open_data
from gpt2_jax.data.records import rows
from gpt2_jax.data.text.documents import find_documents
from tests.data.records.record_files import arrow, parquet, write

GOOD = b'{"prompt": "a", "completion": "b"}\n'
OPTIONS: dict[str, Any] = {"tokenizer": "bytes", "validation_fraction": 0}


def opened(source: Path, *, records: RecordOptions | None = None, **options: Any) -> Data:
    cache = source.parent / ".cache"
    return open_data(source, **{**OPTIONS, "cache": cache, "records": records or RecordOptions(), **options})


def of_messages(*messages: Any) -> bytes:
    return json.dumps({"messages": messages}).encode()


USER, REPLY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}

BAD_LINES = {  # line -> its message, and the reason in the count
    b"{": ("is not valid JSON", "not valid JSON"),
    b"{'prompt': 1}": ("is not valid JSON", "not valid JSON"),
    b"[" * 100_000: ("is not valid JSON", "not valid JSON"),
    b"1" * 10_000: ("is not valid JSON", "not valid JSON"),
    b'{"prompt": "\xff", "completion": "b"}': ("is not UTF-8", "not UTF-8"),
    b"[1, 2]": ("is list and not an object", "not a JSON object"),
    b'"text"': ("is str and not an object", "not a JSON object"),
    b'{"prompt": "a"}': ("has no field 'completion'", "without a field"),
    b'{"prompt": null, "completion": "b"}': ("the field 'prompt' is null", "with a field of another type"),
    b'{"prompt": "a", "completion": 3}': ("the field 'completion' is int", "with a field of another type"),
    b'{"prompt": "a", "completion": ["b"]}': ("the field 'completion' is list", "with a field of another type"),
    b'{"prompt": "a", "completion": ""}': ("the field 'completion' is empty", "with an empty completion"),
    b'{"prompt": "a\\u0000", "completion": "b"}': ("the field 'prompt' has a NUL character", "with a NUL character"),
    b'{"prompt": "abcd", "completion": "efgh"}': ("has 9 tokens, and an example at most 8", "longer than --seq-len"),
}
BAD_CHATS = {
    b'{"messages": "a"}': ("'messages' is not a list of messages", "with a field of another type"),
    b'{"messages": [1]}': ("'messages' is not a list of messages", "with a field of another type"),
    b'{"messages": {"role": ["user"]}}': ("'messages' is not a list of messages", "with a field of another type"),
    of_messages({"role": "user"}, REPLY): ("has no field 'content'", "without a field"),
    of_messages(USER, {"role": "assistant", "content": [1]}): (
        "the field 'messages[1].content' is list",
        "with a field of another type",
    ),
    of_messages(USER): ("has no message of the assistant", "without a message of the assistant"),
    of_messages(): ("has no message of the assistant", "without a message of the assistant"),
    of_messages(REPLY): ("begins with the assistant", "that begin with the assistant"),
    of_messages(USER, {**REPLY, "content": ""}): ("'messages[1].content' is empty", "with an empty completion"),
    of_messages(*[USER, REPLY] * 257): ("has more than 256 messages of the assistant", "with too many messages"),
    of_messages(*[{**USER, "content": "a" * 4000}, REPLY] * 80): (
        "too much text for 80 replies",
        "with too many messages",
    ),
    of_messages({**USER, "content": "rude"}, REPLY): (
        "rejects the messages: 'no'",
        "that the tokenizer or its template",
    ),
}
RECORDS = RecordOptions(max_tokens=8)


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:40])
def test_a_bad_record_is_named_or_counted(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + line + b"\n" + GOOD + line)
    message, reason = BAD_LINES[line]
    with within_budget(), pytest.raises(DataError) as caught:
        opened(tmp_path / "a.jsonl", records=RECORDS)
    assert f"a.jsonl', line 3: {message}" in str(caught.value)
    assert str(caught.value).endswith("or leave out and count such records with --skip-bad-records")
    assert str(caught.value).isprintable()
    assert [*tmp_path.glob(".cache/tokens*")] == []
    data = opened(tmp_path / "a.jsonl", records=RecordOptions(max_tokens=8, skip_bad=True))
    assert data.train.read(0, len(data.train)).tolist() == [97, 98, 256] * 2
    assert data.description.endswith(f"2 records were left out: 2 {reason}")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("line", BAD_CHATS, ids=lambda line: line[:60])
def test_a_bad_conversation_is_named_or_counted(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "tokenizer").mkdir()
    rude = "{% if messages[0].content == 'rude' %}{{ raise_exception('no') }}{% endif %}"
    write_chat_tokenizer(tmp_path / "tokenizer", rude + CHATML)
    good = of_messages(USER, REPLY) + b"\n"
    (tmp_path / "a.jsonl").write_bytes(good + line + b"\n" + good)
    message, reason = BAD_CHATS[line]
    tokenizer = str(tmp_path / "tokenizer")
    with pytest.raises(DataError) as caught:
        opened(tmp_path / "a.jsonl", tokenizer=tokenizer)
    assert "a.jsonl', line 2: " in str(caught.value) and message in str(caught.value)
    data = opened(tmp_path / "a.jsonl", tokenizer=tokenizer, records=RecordOptions(skip_bad=True))
    assert data.train.document_ends is not None and len(data.train.document_ends) == 2
    assert f"1 record was left out: 1 {reason}" in data.description


def test_the_first_bad_record_is_named_whatever_is_wrong_with_it(tmp_path: Path) -> None:
    long = b'{"prompt": "abcd", "completion": "efgh"}\n'
    (tmp_path / "a.jsonl").write_bytes(GOOD + long + b"{\n")
    with pytest.raises(DataError, match=r"line 2: has 9 tokens.*; raise --seq-len, or leave out"):
        opened(tmp_path / "a.jsonl", records=RECORDS)


def test_empty_texts_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", [{"text": "a"}, {"text": ""}, {"text": "b"}])
    assert opened(path).description.endswith("1 record was left out: 1 with an empty text")


def test_a_source_without_a_usable_record_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", [{"text": ""}])
    with pytest.raises(DataError, match=r"a\.jsonl' has no text: 1 record was left out: 1 with an empty text"):
        opened(path)


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "nul.jsonl": (GOOD + b'{"prompt": "\0"}\n', "line 2: has a NUL byte"),
    "utf-16.csv": ("prompt,completion\na,b\n".encode("utf-16"), "line 1: has a NUL byte"),
    "object.json": (b'{\n"text": "a"\n}\n', "line 1: is not valid JSON"),
    "open.json": (b'[{"text": "a"}, {"text": "b"}', "record 2: is not valid JSON: 'the array does not end'"),
    "comma.json": (b'[{"text": "a"} {"text": "b"}]', "record 1: expected , but found '{'"),
    "broken.json": (b'[{"text": "a"}, {"text": b}]', "record 2: is not valid JSON"),
    "more.json": (b'[{"text": "a"}] {}', "record 1: has more text after the array"),
    "deep.json": (b"[" * 200_000, "record 1: is not valid JSON"),
    "nul.json": (b'[{"text": "a"}, \0]', "record 1: has a NUL byte near it"),
    "latin.json": (b'[{"text": "\xe9"}]', "is not UTF-8"),
    "numbers.json": (b"[1, 2]", "record 1: is int and not an object"),
    "schema.json": (b'{"name": "x", "version": 1}', "its fields are 'name', 'version'"),
    "escape.jsonl": (b'{"\\u001b[31m": 1}', "its fields are '\\x1b[31m'"),
    "none.jsonl": (b"\n\n", "has no records"),
    "none.json": (b"[ ]", "has no records"),
    "values.jsonl": (b'{"text": [' + b"{}," * 600_000 + b"{}]}", "line 1 holds more than 2097152 values, or"),
    "values.json": (b'[{"text": [' + b"{}," * 600_000 + b"{}]}]", "record 1 holds more than 2097152 values, or"),
    "header.csv": (b"a;b\nc;d\n", "its fields are 'a;b'"),
    "only-header.csv": (b"text\n", "only-header.csv' has no text"),
    "twice.csv": (b"text,text\na,b\n", "line 1: the column 'text' occurs 2 times"),
    "quote.csv": (b'text\n"a"b\n', "line 2: is not valid CSV: "),
    "open.csv": (b'text\n"a\n', "line 2: is not valid CSV: 'unexpected end of data'"),
    "wide.csv": (b"text,n\na,1\na,1,2\n", "line 3: has 3 fields, and the first line names 2 columns"),
    "short.tsv": (b"text\tn\na\n", "line 2: has 1 fields, and the first line names 2 columns"),
    "latin.csv": (b"text\n\xe9\n", "line 2: is not UTF-8"),
    "chat.csv": (b'messages\n"[]"\n', "CSV and TSV cannot hold messages; write the records as JSON lines"),
    "not.parquet": (b"PAR1" + b"x" * 100 + b"PAR1", "not.parquet' cannot be read as Parquet"),
    "not.arrow": (b"\xff\xff\xff\xff" + b"x" * 100, "not.arrow' cannot be read as Arrow"),
    "lfs.parquet": (b"version https://git-lfs.github.com/spec/v1\n", "lfs.parquet' cannot be read as Parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow")
    content, expected = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with within_budget(), pytest.raises(DataError) as caught:
        opened(tmp_path / name)
    assert expected in str(caught.value) and name in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    assert [*tmp_path.glob(".cache/tokens*")] == []


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl"])
def test_a_record_over_the_limit_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("rows", "json_records", "csv_records"):
        monkeypatch.setattr(f"gpt2_jax.data.records.{module}.MOST_ROW_BYTES", 2**19)
    content = {
        "a.csv": b'text\n"' + b"a\n" * 2**19,
        "a.json": b'[{"text": "' + b"a" * 2**20,
        "a.jsonl": b'{"text": "' + b"a" * 2**20,
    }
    (tmp_path / name).write_bytes(content[name])
    with pytest.raises(DataError, match=r"has more than 52428\d bytes, the limit for one record; split it"):
        opened(tmp_path / name)


def test_a_csv_field_may_be_longer_than_the_limit_of_the_module(tmp_path: Path) -> None:
    import csv

    limit = csv.field_size_limit()
    path = write(tmp_path, "a.csv", [{"text": "a" * (limit + 1)}])
    assert len(opened(path).train) == limit + 2 and csv.field_size_limit() == limit
    assert limit < rows.MOST_ROW_BYTES


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow"])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([{"a": "x"}], "the column 'text' is 'struct<a: string>' and not text; nested columns are not read"),
        ([["x"]], "and not text; nested columns are not read"),
        ([1, 2], "the column 'text' is 'int64' and not text"),
    ],
)
def test_a_column_of_another_type_is_refused(tmp_path: Path, name: str, values: list[Any], expected: str) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError) as caught:
        opened(write(tmp_path, name, [{"text": value} for value in values]))
    assert expected in str(caught.value)


def test_messages_in_a_column_of_text_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    write_chat_tokenizer(tmp_path)
    with pytest.raises(DataError, match="the column 'messages' is 'string'; messages are a list of structs"):
        opened(write(tmp_path / "data", "a.parquet", [{"messages": "a"}]), tokenizer=str(tmp_path))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_damaged_table_is_refused_or_read(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("pyarrow")
    table = [{"text": f"row {i}"} for i in range(20)]
    whole = parquet(table) if kind == "parquet" else arrow(table, stream=True)
    path = tmp_path / f"a.{kind}"
    refused = 0
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        try:
            opened(path)
        except BridgeError:
            refused += 1
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=f"a.{kind}"):
        opened(path)
    assert refused > 10


@pytest.mark.parametrize("name", sorted({"a.csv", "a.parquet"}))
def test_a_file_without_the_columns_of_the_others_is_refused(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow")
    write(tmp_path / "data" / "1", name, [{"text": "a"}])
    write(tmp_path / "data" / "2", name, [{"body": "a"}])
    with pytest.raises(DataError, match=r"has no (column|field) '(text|body)'|has neither text"):
        opened(tmp_path / "data", records=RecordOptions(skip_bad=True))


def test_a_mixture_of_text_and_records_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "data", "a.jsonl", [{"text": "a"}])
    (tmp_path / "data" / "README.md").write_text("# Data")
    with pytest.raises(DataError, match=r"has both records, such as 'a.jsonl', and text, such as 'README.md'"):
        opened(tmp_path / "data")
    assert len(opened(tmp_path / "data" / "*.jsonl").train) == 2
    with pytest.raises(DataError, match="holds records, and this command reads text"):
        find_documents(tmp_path / "data")


@pytest.mark.parametrize("names", [["a.jsonl"], ["a.csv"], ["b.csv", "a.csv"]])
def test_records_are_never_read_as_text(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b'{"a": "b"}\n' if name.endswith("jsonl") else b"a,b\nc,d\n")
    with pytest.raises(DataError, match="has neither text, nor prompt and completion, nor messages"):
        opened(tmp_path / names[0] if len(names) == 1 else tmp_path)


def test_names_of_fields_have_no_effect_on_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for options in (RecordOptions(text_field="text"), RecordOptions(skip_bad=True)):
        with pytest.raises(DataError, match="does not hold records, so names of fields"):
            opened(tmp_path / "a.txt", records=options)


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="does not exist"):
        opened(tmp_path / "a.jsonl")

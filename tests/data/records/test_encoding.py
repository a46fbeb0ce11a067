"""Records of every format: ids and loss mask equal a plain loop with transformers' tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.chats import CHATML, LLAMA_2, read_chat_tokenizer, write_chat_tokenizer

import bridge
from bridge import IGNORE_INDEX, save_tokenizer
from gpt2_jax.data import Data, DataError, RecordOptions, TokenStream, open_data, training_batches
from gpt2_jax.data.records import encoding
from tests.data.records.record_files import WRITERS, write, write_saved_dataset

pytest.importorskip("pyarrow")
transformers = pytest.importorskip("transformers")

TEXT = 'To be, or not to be:\n\n  that is "the question"; naïve, 日本語, \ttab <|endoftext|> x'
TEXTS = [{"id": i, "text": TEXT[3 * i :] * (i % 3 + 1)} for i in range(11)]
PAIRS = [{"prompt": f"What is {i} + {i}?", "completion": f" {i + i},\n" + "so" * (i % 4), "id": i} for i in range(11)]
CHATS = [
    {
        "messages": [
            *([{"role": "system", "content": "Be brief."}] if i % 2 else []),
            {"role": "user", "content": f"Who is {i}?"},
            {"role": "assistant", "content": f"I am {i}."},
            *([{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Bye!"}] if i % 3 else []),
            *([{"role": "user", "content": "Still there?"}] if i == 4 else []),
        ]
    }
    for i in range(9)
]
Expected = tuple[list[int], list[bool]]


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of the bundled model as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(bridge.load(bridge.BUNDLED).tokenizer(), directory)
    return directory


def concatenated(parts: Sequence[Expected]) -> Expected:
    return [i for ids, _ in parts for i in ids], [c for _, counts in parts for c in counts]


def expected_texts(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> Expected:
    ids = [[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id] for row in rows]
    return concatenated([(one, [True] * len(one)) for one in ids])


def expected_pairs(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> Expected:
    found = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        found.append((prompt + completion, [False] * len(prompt) + [True] * len(completion)))
    return concatenated(found)


def expected_chats(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> Expected:
    found: list[Expected] = []
    for row in rows:
        messages, done = row["messages"], ""
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        for k, message in enumerate(messages):
            if message["role"] == "assistant":
                before = tokenizer.apply_chat_template(messages[:k], tokenize=False, add_generation_prompt=True)
                after = tokenizer.apply_chat_template(messages[: k + 1], tokenize=False)
                for piece, counts in ((before[len(done) :], False), (after[len(before) :], True)):
                    ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
                    found.append((ids, [counts] * len(ids)))
                done = after
        rest = tokenizer(text[len(done) :], add_special_tokens=False)["input_ids"]
        found.append((rest, [False] * len(rest)))
    return concatenated(found)


def read_all(stream: TokenStream) -> Expected:
    ids = stream.read(0, len(stream)).tolist()
    counts = [1] * len(ids) if stream.counts is None else stream.counts.read(0, len(stream)).tolist()
    return ids, [count == 1 for count in counts]


def opened(source: Path, tokenizer: Any, cache: Path, **options: Any) -> Data:
    records = RecordOptions(**{k: options.pop(k) for k in [*options] if k in RecordOptions.__dataclass_fields__})
    return open_data(source, tokenizer=tokenizer, validation_fraction=0, cache=cache, records=records, **options)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_MOST_EXAMPLES", 4)  # several blocks are encoded at the same time


@pytest.mark.parametrize("name", WRITERS)
def test_texts(tmp_path: Path, bundled: Path, name: str) -> None:
    data = opened(write(tmp_path, name, TEXTS), str(bundled), tmp_path / "cache")
    expected = expected_texts(TEXTS, transformers.AutoTokenizer.from_pretrained(bundled))
    assert read_all(data.train) == expected
    assert data.train.counts is None and data.usual_examples == "stream"
    assert data.train.document_ends is not None and len(data.train.document_ends) == len(TEXTS)


@pytest.mark.parametrize("name", WRITERS)
def test_prompts_and_completions(tmp_path: Path, bundled: Path, name: str) -> None:
    data = opened(write(tmp_path, name, PAIRS), str(bundled), tmp_path / "cache")
    assert read_all(data.train) == expected_pairs(PAIRS, transformers.AutoTokenizer.from_pretrained(bundled))
    assert data.usual_examples == "documents"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("template", [CHATML, LLAMA_2])
@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.parquet", "stream.arrow"])
def test_messages(tmp_path: Path, template: str, name: str) -> None:
    (tmp_path / "tokenizer").mkdir()
    write_chat_tokenizer(tmp_path / "tokenizer", template)
    data = opened(write(tmp_path, name, CHATS), str(tmp_path / "tokenizer"), tmp_path / "cache")
    ids, counts = read_all(data.train)
    theirs, their_counts = expected_chats(CHATS, transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer"))
    # Where the last message is the user's and has no end-of-sequence token, one is added, which does not count.
    if template == LLAMA_2:
        assert data.train.document_ends is not None
        at = int(data.train.document_ends[4]) - 1
        assert (ids.pop(at), counts.pop(at)) == (258, False)
    assert (ids, counts) == (theirs, their_counts)


def test_a_saved_dataset(tmp_path: Path, bundled: Path) -> None:
    data = opened(write_saved_dataset(tmp_path / "saved", PAIRS), str(bundled), tmp_path / "cache")
    assert read_all(data.train) == expected_pairs(PAIRS, transformers.AutoTokenizer.from_pretrained(bundled))


def test_several_files_are_concatenated_in_the_order_of_files(tmp_path: Path, bundled: Path) -> None:
    for k in range(3):
        write(tmp_path / "data" / str(k), "a.jsonl", TEXTS[3 * k : 3 * k + 3])
    data = opened(tmp_path / "data", str(bundled), tmp_path / "cache")
    order = sorted(range(3), key=lambda k: hashlib.sha256(f"{k}/a.jsonl".encode()).digest())
    rows = [row for k in order for row in TEXTS[3 * k : 3 * k + 3]]
    assert read_all(data.train) == expected_texts(rows, transformers.AutoTokenizer.from_pretrained(bundled))
    again = opened(tmp_path / "data" / "**" / "*.jsonl", str(bundled), tmp_path / "cache")
    assert sorted(read_all(again.train)[0]) == sorted(read_all(data.train)[0])


def test_labels_are_masked_in_batches(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", [{"prompt": "ab", "completion": "cd"}])
    stream = opened(path, "bytes", tmp_path / "cache").train
    batch = next(training_batches(stream, batch_size=1, seq_len=6, examples="documents"))
    assert batch["input_ids"].tolist() == [[97, 98, 99, 100, 256, 0]]
    ignore = IGNORE_INDEX
    assert batch["labels"].tolist() == [[ignore, 99, 100, 256, ignore, ignore]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0]]
    window = next(training_batches(stream, batch_size=1, seq_len=4, examples="stream"))
    assert window["labels"].tolist() == [[ignore, 99, 100, 256]]


def test_records_with_completions_are_split_between_records(tmp_path: Path) -> None:
    rows = [{"prompt": "p" * 50, "completion": "c"}, {"prompt": "p", "completion": "c"}]
    path = write(tmp_path, "a.jsonl", rows)
    data = open_data(path, tokenizer="bytes", validation_fraction=0.5, cache=tmp_path / "cache")
    assert data.validation is not None and (len(data.train), len(data.validation)) == (52, 3)
    write(tmp_path, "a.jsonl", rows[:1])
    with pytest.raises(DataError, match="one record cannot be split"):
        open_data(path, tokenizer="bytes", cache=tmp_path / "cache")


def test_the_cache_has_one_byte_per_token_that_is_verified(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", PAIRS)
    before = opened(path, "bytes", tmp_path / "cache").train
    [directory] = (tmp_path / "cache").iterdir()
    counts = (directory / "counts_in_loss.bin").read_bytes()
    about = json.loads((directory / "tokens.json").read_text())
    assert [*counts] == [int(c) for c in read_all(before)[1]]
    assert about["counts_sha256"] == hashlib.sha256(counts).hexdigest()
    (directory / "counts_in_loss.bin").write_bytes(bytes([1 - counts[0], *counts[1:]]))
    again = opened(path, "bytes", tmp_path / "cache").train
    assert (directory / "counts_in_loss.bin").read_bytes() == counts
    assert read_all(again) == read_all(before) and again.fingerprint == before.fingerprint


def test_the_mask_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    one = write(tmp_path, "a.jsonl", [{"prompt": "ab", "completion": "cd"}])
    other = write(tmp_path, "a.ndjson", [{"prompt": "a", "completion": "bcd"}])
    a, b = (opened(path, "bytes", tmp_path / "cache").train for path in (one, other))
    assert read_all(a)[0] == read_all(b)[0] and a.fingerprint != b.fingerprint


def test_each_way_of_reading_has_its_own_place_in_the_cache(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", [{"prompt": "a", "completion": "b", "text": "c"}])
    ways: list[dict[str, Any]] = [
        {"text_field": "text"},
        {"text_field": "prompt"},
        {"prompt_field": "prompt"},
        {"prompt_field": "text"},
        {"prompt_field": "prompt", "max_tokens": 3},
        {"prompt_field": "prompt", "skip_bad": True},
        {"text_field": "text", "special_tokens": "as_text"},
    ]
    for number, way in enumerate(ways, 1):
        opened(path, "bytes", tmp_path / "cache", **way)
        assert len([*(tmp_path / "cache").iterdir()]) == number
    opened(path, "bytes", tmp_path / "cache", text_field="text", max_tokens=3)
    assert len([*(tmp_path / "cache").iterdir()]) == len(ways), "text has no limit"


def test_the_template_is_part_of_the_key(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", CHATS)
    (tmp_path / "tokenizer").mkdir()
    for number, template in enumerate((CHATML, "{# other #}" + CHATML), 1):
        write_chat_tokenizer(tmp_path / "tokenizer", template)
        opened(path, read_chat_tokenizer(tmp_path / "tokenizer"), tmp_path / "cache")
        assert len([*(tmp_path / "cache").iterdir()]) == number


@pytest.mark.parametrize("policy", ["match", "as_text", "error"])
def test_special_tokens_in_a_message(tmp_path: Path, policy: str) -> None:
    (tmp_path / "tokenizer").mkdir()
    write_chat_tokenizer(tmp_path / "tokenizer")
    tokenizer = read_chat_tokenizer(tmp_path / "tokenizer")
    messages = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "ok"}]
    path = write(tmp_path, "a.jsonl", [{"messages": messages}])
    if policy == "error":
        with pytest.raises(DataError, match=r"a\.jsonl', line 1: the text contains the token '<\|im_end\|>'"):
            opened(path, tokenizer, tmp_path / "cache", special_tokens=policy)
        return
    ids, _ = read_all(opened(path, tokenizer, tmp_path / "cache", special_tokens=policy).train)
    end = tokenizer.id_of("<|im_end|>")
    assert ids.count(end or 0) == (3 if policy == "match" else 2)


@pytest.mark.parametrize("kind", ["bpe", "characters"])
def test_a_tokenizer_is_trained_on_the_fields_only(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, "a.jsonl", [{"text": "abc abc", "other": "xyz {"}] * 3)
    data = opened(path, kind, tmp_path / "cache", vocab_size=300)
    assert data.tokenizer is not None
    assert data.tokenizer.decode(data.train.read(0, len(data.train)).tolist()).startswith("abc abc")
    if kind == "characters":
        assert data.tokenizer.vocab_size == len(set("abc "))

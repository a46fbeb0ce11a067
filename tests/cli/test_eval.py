"""`gpt2 eval`: its figures, its sources of text, and its errors."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.commands import CONFIG, needs_torch, run
from support.models import huggingface_directory, random_checkpoint
from support.tokenizers_for_tests import write_byte_tokenizer

import bridge
from bridge.tokenizers.loading import byte_tokenizer
from gpt2_jax.cli.evaluated_text import encode_documents
from gpt2_jax.data import open_data
from gpt2_jax.data.text.documents import find_documents
from gpt2_jax.data.tokens.cache import cached_text

TEXT = "Grüße — one word\nafter another,  two spaces, and a tail that goes on for some windows more. " * 2

FP32 = 1e-6  # relative; the orders of summation differ


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


def figures(tmp_path: Path, *arguments: object) -> dict:
    assert run("eval", *arguments, "--json", tmp_path / "figures.json", "--overwrite") == 0
    return json.loads((tmp_path / "figures.json").read_text())


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_figures_match_the_text(
    backend: str, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpt2_torch

    found = figures(tmp_path, model, "--data", text, "--backend", backend, "--context", 30, "--stride", 10)
    raw, words = TEXT.encode(), len(TEXT.split())
    expected = gpt2_torch.evaluate(
        gpt2_torch.model_from_checkpoint(random_checkpoint(CONFIG)), np.frombuffer(raw, np.uint8), context=30, stride=10
    )
    assert (found["tokens"], found["predicted_tokens"]) == (len(raw), len(raw) - 1)
    assert (found["words"], found["bytes"]) == (words, len(raw))
    assert (found["context"], found["stride"], found["windows"]) == (30, 10, expected.windows)
    assert found["nats"] == pytest.approx(expected.nats, rel=FP32)
    assert found["loss"] == pytest.approx(found["nats"] / (len(raw) - 1))
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["perplexity_per_word"] == pytest.approx(math.exp(found["nats"] / words))
    assert found["bits_per_byte"] == pytest.approx(found["nats"] / math.log(2) / len(raw))
    assert found["transformers_loss"] == pytest.approx(expected.transformers_loss, rel=FP32)
    shown = capsys.readouterr().out
    for part in (f"{found['loss']:.4f}", f"{found['bits_per_byte']:.4f}", f"{len(raw) - 1}", f"with {backend}"):
        assert part in shown


def test_the_default_context_and_stride_are_reported(model: Path, text: Path, tmp_path: Path) -> None:
    found = figures(tmp_path, model, "--data", text)
    assert (found["context"], found["stride"]) == (40, 20)


@needs_torch
@pytest.mark.parametrize("limit", [2, 3, 4, 20, 10_000])
def test_words_and_bytes_are_counted_up_to_max_tokens(limit: int, model: Path, text: Path, tmp_path: Path) -> None:
    found = figures(tmp_path, model, "--data", text, "--max-tokens", limit, "--backend", "torch")
    raw = TEXT.encode()[:limit]
    assert (found["tokens"], found["bytes"]) == (len(raw), len(raw))
    assert found["words"] == len(raw.decode(errors="ignore").split())


def test_documents_are_separated_by_the_end_of_text_token(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name, part in (("a.txt", "one two "), ("b.txt", " three"), ("c.txt", "four")):
        (tmp_path / "texts" / name).write_text(part)
    documents, calls = find_documents(tmp_path / "texts"), []
    found = encode_documents(documents, byte_tokenizer(), "match", 1000, lambda *call: calls.append(call))
    order = [d.path.read_bytes() for d in documents.readable()]
    assert found.ids.tolist() == [*order[0], 256, *order[1], 256, *order[2]]
    assert (found.words, found.bytes) == (4, 18)
    assert calls[-1] == (18, 18)
    assert found.names == tuple(d.name for d in documents.files)
    assert found.document_ends.tolist() == [*(len(order[0]) + 1 + np.array([0, len(order[1]) + 1])), len(found.ids)]
    cut = encode_documents(documents, byte_tokenizer(), "match", len(order[0]) + 1, lambda *call: None)
    assert cut.ids.tolist() == [*order[0], 256]
    assert cut.bytes == len(order[0])


NOT_IN_TOKENS = ("words", "bytes", "documents", "perplexity_per_word", "bits_per_byte")


def test_token_files_have_no_words_or_bytes(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.frombuffer(TEXT.encode(), np.uint8).astype("<u2").tofile(tmp_path / "tokens.bin")
    found = figures(tmp_path, model, "--data", tmp_path / "tokens.bin", "--max-tokens", 50)
    assert found["tokens"] == 50
    assert found["perplexity"] > 1
    assert [found[name] for name in NOT_IN_TOKENS] == [None] * 5
    assert capsys.readouterr().out.count("not available") == 5


def test_a_directory_of_token_files_evaluates_the_validation_files(model: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    for name, count in (("train.bin", 90), ("val.bin", 33)):
        np.arange(count, dtype="<u2").tofile(tmp_path / "tokens" / name)
    assert figures(tmp_path, model, "--data", tmp_path / "tokens")["tokens"] == 33


def test_a_token_cache_of_training_can_be_evaluated(model: Path, text: Path, tmp_path: Path) -> None:
    cached_text(find_documents(text), byte_tokenizer(), cache=tmp_path / "cache")
    [directory] = (tmp_path / "cache").iterdir()
    found = figures(tmp_path, model, "--data", directory, "--max-tokens", 100)
    assert found["nats"] == figures(tmp_path, model, "--data", text, "--max-tokens", 100)["nats"]
    assert found["bytes"] is None


def test_a_damaged_cache_is_refused(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cached_text(find_documents(text), byte_tokenizer(), cache=tmp_path / "cache")
    (directory,) = (tmp_path / "cache").iterdir()
    content = bytearray((directory / "tokens.bin").read_bytes())
    content[0] ^= 1
    (directory / "tokens.bin").write_bytes(content)
    assert run("eval", model, "--data", directory) == 2
    assert "is damaged" in capsys.readouterr().err


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for name, part in (("a.txt", TEXT[:50]), ("b.txt", TEXT[50:170]), ("c.txt", "x")):
        (tmp_path / "texts" / name).write_bytes(part.encode())
    return tmp_path / "texts"


def test_records_of_documents_and_tokens_add_up_to_the_report(model: Path, texts: Path, tmp_path: Path) -> None:
    files = ("--per-document", tmp_path / "documents.jsonl", "--per-token", tmp_path / "tokens.jsonl")
    found = figures(tmp_path, model, "--data", texts, *files)
    documents, tokens = lines_of(tmp_path / "documents.jsonl"), lines_of(tmp_path / "tokens.jsonl")
    assert documents[0].pop("generator") == tokens[0].pop("generator") == f"gpt2-bridge {bridge.__version__}"

    assert [d["document"] for d in documents] == [0, 1, 2]
    assert [d["name"] for d in documents] == [d.name for d in find_documents(texts).files]
    for name in ("tokens", "predicted_tokens"):
        assert sum(d[name] for d in documents) == found[name]
    assert sum(d["nats"] for d in documents) == pytest.approx(found["nats"])
    for one in documents:
        assert one["loss"] == pytest.approx(one["nats"] / one["predicted_tokens"])
        assert one["perplexity"] == pytest.approx(math.exp(one["loss"]))

    raw = b"".join((texts / d["name"]).read_bytes() for d in documents)  # the tokenizer has no token between documents
    assert [t["id"] for t in tokens] == [*raw]
    assert [t["position"] for t in tokens] == [*range(len(raw))]
    assert [t["text"] for t in tokens if t["id"] < 128] == [chr(b) for b in raw if b < 128]
    assert (tokens[0]["logprob"], tokens[0]["rank"]) == (None, None)
    assert -sum(t["logprob"] for t in tokens[1:]) == pytest.approx(found["nats"])
    assert min(t["rank"] for t in tokens[1:]) >= 1 and max(t["rank"] for t in tokens[1:]) <= 256
    for one in documents:
        of_document = [t for t in tokens if t["document"] == one["document"]]
        assert len(of_document) == one["tokens"]
        assert -sum(t["logprob"] or 0 for t in of_document) == pytest.approx(one["nats"], abs=1e-4)
    assert (found["documents"], found["separate_documents"]) == (3, False)
    assert found["fingerprint"] == bridge.fingerprint(bridge.load(model).tensors)


@needs_torch
def test_separate_documents_are_evaluated_as_if_alone(model: Path, texts: Path, tmp_path: Path) -> None:
    more = ("--backend", "torch")
    file = tmp_path / "documents.jsonl"
    found = figures(tmp_path, model, "--data", texts, "--separate-documents", "--per-document", file, *more)
    for one in lines_of(file):
        if one["tokens"] > 1:
            alone = figures(tmp_path, model, "--data", texts / one["name"], *more)
            assert one["nats"] == pytest.approx(alone["nats"], rel=FP32)
        else:
            assert (one["predicted_tokens"], one["loss"], one["perplexity"]) == (0, None, None)
    assert (found["separate_documents"], found["transformers_loss"]) == (True, None)
    assert found["predicted_tokens"] == found["tokens"] - 3


@needs_torch
def test_only_completions_of_records_are_scored(tmp_path: Path) -> None:
    """A cache of prompts and completions, as `gpt2 train` writes it."""
    config = replace(CONFIG, vocab_size=257)
    model = huggingface_directory(tmp_path / "model", config)
    pairs = [(f"{i} + {i} =", f" {i + i}") for i in range(12)]
    lines = (json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs)
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    open_data(tmp_path / "pairs.jsonl", tokenizer=byte_tokenizer(), cache=tmp_path / "cache")
    [directory] = (tmp_path / "cache").iterdir()
    file, more = tmp_path / "documents.jsonl", ("--backend", "torch")
    found = figures(tmp_path, model, "--data", directory, "--per-document", file, *more)
    import gpt2_torch

    decoder = gpt2_torch.Decoder(gpt2_torch.model_from_checkpoint(bridge.load(model)))
    ids = [([*prompt.encode()], [*completion.encode(), 256]) for prompt, completion in pairs]
    expected = bridge.loglikelihood(decoder, ids)
    assert [one["nats"] for one in lines_of(file)] == pytest.approx([-one.logprob for one in expected], rel=1e-5)
    assert found["predicted_tokens"] == sum(one.num_tokens for one in expected)
    assert found["nats"] == pytest.approx(-sum(one.logprob for one in expected), rel=1e-5)
    assert found["separate_documents"] is True


def test_earlier_records_are_replaced_only_on_request(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, foreign = tmp_path / "tokens.jsonl", tmp_path / "foreign.jsonl"
    foreign.write_text('{"document": 0}\n')
    arguments = ("eval", model, "--data", text, "--max-tokens", 20, "--per-token")
    assert run(*arguments, file) == 0
    before = file.read_bytes()
    assert run(*arguments, file) == 2
    assert "exists" in capsys.readouterr().err
    assert run(*arguments, file, "--overwrite") == 0
    assert file.read_bytes() == before
    assert run(*arguments, foreign, "--overwrite") == 2
    assert "is not a report of this command" in capsys.readouterr().err
    assert foreign.read_text() == '{"document": 0}\n'


def test_perplexity_per_word_that_overflows_is_null(model: Path, tmp_path: Path) -> None:
    (tmp_path / "word.txt").write_text("x" * 900)
    found = figures(tmp_path, model, "--data", tmp_path / "word.txt")
    assert found["words"] == 1
    assert found["perplexity_per_word"] is None  # exp of thousands


@needs_torch
def test_both_backends_agree_in_float64(text: Path, tmp_path: Path) -> None:
    path = huggingface_directory(tmp_path / "wide", CONFIG, dtype="float64")
    write_byte_tokenizer(path)
    reference, port = (figures(tmp_path, path, "--data", text, "--backend", b)["nats"] for b in ("torch", "jax"))
    assert port == pytest.approx(reference, rel=1e-12)  # float32 would give 1e-7


BAD = {
    "no such text": ("eval", "{model}", "--data", "{tmp}/nowhere.txt"),
    "empty text": ("eval", "{model}", "--data", "{tmp}/empty.txt"),
    "one token": ("eval", "{model}", "--data", "{tmp}/one.txt"),
    "not UTF-8": ("eval", "{model}", "--data", "{tmp}/latin.txt"),
    "foreign tokens": ("eval", "{model}", "--data", "{tmp}/foreign.bin"),
    "stride beyond the context": ("eval", "{model}", "--data", "{tmp}/text.txt", "--context", "8", "--stride", "9"),
    "context beyond the model": ("eval", "{model}", "--data", "{tmp}/text.txt", "--context", "41"),
    "no batch": ("eval", "{model}", "--data", "{tmp}/text.txt", "--batch-size", "0"),
    "a limit of one token": ("eval", "{model}", "--data", "{tmp}/text.txt", "--max-tokens", "1"),
    "unwritable json": ("eval", "{model}", "--data", "{tmp}/text.txt", "--json", "{tmp}/nowhere/f.json"),
    "unknown backend": ("eval", "{model}", "--data", "{tmp}/text.txt", "--backend", "flax"),
    "two reports in one file": ("eval", "{model}", "--json", "{tmp}/a.jsonl", "--per-token", "{tmp}/a.jsonl"),
    "an effect without a report": ("eval", "{model}", "--overwrite"),
    "documents of a token file": ("eval", "{model}", "--data", "{tmp}/ids.bin", "--per-document", "{tmp}/a.jsonl"),
    "separate documents of a token file": ("eval", "{model}", "--data", "{tmp}/ids.bin", "--separate-documents"),
    "no tokenizer": ("eval", "{bare}", "--data", "{tmp}/text.txt"),
    "weights not finite": ("eval", "{broken}", "--data", "{tmp}/text.txt"),
}
ONE_LINE = BAD.keys() - {"unknown backend"}  # tyro prints these errors in a box


@pytest.mark.parametrize("why", BAD)
def test_bad_input_exits_with_2_and_a_message(
    why: str, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare, broken = huggingface_directory(tmp_path / "bare", CONFIG), tmp_path / "broken"
    state = dict(random_checkpoint(CONFIG).tensors.items())
    state["ln_f.bias"] = np.full_like(state["ln_f.bias"], np.nan)
    bridge.save(bridge.Checkpoint.of(state, CONFIG), broken, format="huggingface", allow_non_finite=True)
    write_byte_tokenizer(broken)
    for name, content in (("empty.txt", b""), ("one.txt", b"x"), ("latin.txt", "Grüße".encode("latin-1"))):
        (tmp_path / name).write_bytes(content)
    np.array([1, 2, 999, 4] * 3, "<u2").tofile(tmp_path / "foreign.bin")
    np.array([1, 2, 9, 4] * 3, "<u2").tofile(tmp_path / "ids.bin")
    assert run(*(a.format(tmp=tmp_path, model=model, bare=bare, broken=broken) for a in BAD[why])) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert (printed.out + printed.err).strip()
    if why in ONE_LINE:
        assert printed.out == ""
        assert printed.err.startswith("gpt2: ")
        assert printed.err.count("\n") == 1

"""Opening every kind of source: the split into training and validation data, and the tokenizer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge import byte_tokenizer, character_tokenizer, save_tokenizer, tokenizer_fingerprint
from gpt2_jax.data import Data, DataError, evaluation_batches, make_tokenizer, open_data, training_batches
from gpt2_jax.data.dataset import split
from gpt2_jax.data.mixture import Mixture
from gpt2_jax.data.text import tokenizers
from gpt2_jax.data.text.documents import find_documents
from tests.data.token_files import llmc, nanogpt, npy

TEXT = "".join(f"line {i} of the text\n" for i in range(50))
IDS = np.random.default_rng(7).integers(0, 300, 1000)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty documents of 100 to 490 bytes."""
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.txt").write_text((f"this is {i}. " * 60)[: 100 + 10 * i])
    return tmp_path / "texts"


def opened(source: str | Path, cache: Path, **options: Any) -> Data:
    return open_data(source, **({"tokenizer": "bytes", "cache": cache} | options))


def test_one_text_file_is_split_as_nanogpt_splits_it(text_file: Path, tmp_path: Path) -> None:
    data = opened(text_file, tmp_path / "cache", tokenizer="characters")
    assert data.tokenizer is not None and data.validation is not None
    at = int(len(TEXT) * 0.9)
    assert data.tokenizer.decode(data.train.read(0, len(data.train)).tolist()) == TEXT[:at]
    assert data.tokenizer.decode(data.validation.read(0, len(data.validation)).tolist()) == TEXT[at:]
    characters = sorted(set(TEXT))  # nanoGPT's data/shakespeare_char/prepare.py
    assert data.train.read(0, 9).tolist() == [characters.index(c) for c in TEXT[:9]]


def test_a_directory_is_split_between_documents(folder: Path, tmp_path: Path) -> None:
    data = opened(folder, tmp_path / "cache")
    assert data.validation is not None
    total = len(data.train) + len(data.validation)
    assert abs(len(data.validation) - total / 10) < 250  # half of a document
    assert data.train.read(len(data.train) - 1, len(data.train)).tolist() == [256]
    assert data.validation.document_ends is not None and len(data.validation.document_ends) >= 2
    assert data.validation.document_ends[-1] == len(data.validation)
    texts = [d.path.read_bytes() for d in find_documents(folder).files]
    assert bytes(data.validation.read(0, 50).tolist()) in {text[:50] for text in texts}


def test_a_large_document_among_small_ones_is_split(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "large").write_text("x" * 10_000)
    (tmp_path / "texts" / "small").write_text("y")
    data = opened(tmp_path / "texts", tmp_path / "cache", validation_fraction=0.3)
    assert data.validation is not None and len(data.validation) == 3001


@pytest.mark.parametrize("count", [2, 3, 10, 11])
def test_both_parts_of_a_split_have_tokens(tmp_path: Path, count: int) -> None:
    data = open_data(nanogpt(tmp_path / "a.bin", range(count)))
    assert data.validation is not None and len(data.validation) > 0
    assert len(data.train) + len(data.validation) == count


def test_too_few_tokens_to_split_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 tokens cannot be split"):
        open_data(nanogpt(tmp_path / "a.bin", [5]))
    assert open_data(tmp_path / "a.bin", validation_fraction=0).validation is None
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(DataError, match="validation_fraction"):
            open_data(tmp_path / "a.bin", validation_fraction=fraction)


def test_a_split_keeps_the_ends_of_documents(folder: Path, tmp_path: Path) -> None:
    whole = opened(folder, tmp_path / "cache", validation_fraction=0).train
    parts = split(whole, 0.25)
    assert whole.document_ends is not None
    both = [part.document_ends for part in parts]
    assert both[0] is not None and both[1] is not None
    np.testing.assert_array_equal(np.concatenate([both[0], both[1] + len(parts[0])]), whole.document_ends)


def test_token_files_need_no_tokenizer(tmp_path: Path) -> None:
    llmc(tmp_path / "train_0.bin", IDS[:400])
    llmc(tmp_path / "train_1.bin", IDS[400:900])
    npy(tmp_path / "val.npy", IDS[900:])
    data = open_data(tmp_path)
    assert data.validation is not None and data.tokenizer is None
    np.testing.assert_array_equal(data.train.read(0, len(data.train)), IDS[:900])
    np.testing.assert_array_equal(data.validation.read(0, len(data.validation)), IDS[900:])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError, match="empty name"):
        patch.chdir(tmp_path)
        open_data("")
    only = open_data(str(tmp_path / "train_*.bin"))
    assert only.validation is not None and (len(only.train), len(only.validation)) == (810, 90)


def test_a_directory_whose_only_token_file_is_hidden_is_refused(tmp_path: Path) -> None:
    npy(tmp_path / ".x.npy", IDS)
    with pytest.raises(DataError, match="has no token files; names that begin with a dot are ignored"):
        open_data(tmp_path)


def test_validation_may_be_another_source(text_file: Path, folder: Path, tmp_path: Path) -> None:
    data = opened(text_file, tmp_path / "cache", validation=folder)
    assert data.validation is not None
    assert len(data.train) == len(TEXT) + 1
    assert len(data.validation) == sum(100 + 10 * i + 1 for i in range(40))
    tokens = opened(nanogpt(tmp_path / "a.bin", IDS % 256), tmp_path / "cache", validation=text_file)
    assert tokens.validation is not None and (len(tokens.train), len(tokens.validation)) == (1000, len(TEXT) + 1)
    with pytest.raises(DataError, match="is text; give a tokenizer"):
        open_data(tmp_path / "a.bin", validation=text_file)


@pytest.mark.parametrize("made_from_text", ["bpe", "characters"])
def test_no_tokenizer_is_made_from_the_validation_text(text_file: Path, tmp_path: Path, made_from_text: str) -> None:
    with pytest.raises(DataError, match="the data is token files"):
        opened(
            nanogpt(tmp_path / "a.bin", IDS),
            tmp_path / "cache",
            tokenizer=made_from_text,
            vocab_size=300,
            validation=text_file,
        )


def test_the_validation_part_of_a_validation_source_is_used(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    nanogpt(tmp_path / "tokens" / "train.bin", IDS[:900])
    nanogpt(tmp_path / "tokens" / "val.bin", IDS[900:])
    data = open_data(nanogpt(tmp_path / "a.bin", IDS), validation=tmp_path / "tokens")
    assert data.validation is not None and (len(data.train), len(data.validation)) == (1000, 100)


def test_characters_of_both_sources_are_used(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("ä" + TEXT)
    data = opened(text_file, tmp_path / "cache", tokenizer="characters", validation=tmp_path / "other.txt")
    assert data.tokenizer is not None and data.tokenizer.vocab_size == len(set(TEXT)) + 1


def test_a_vocabulary_that_is_too_small_is_found_before_training(tmp_path: Path) -> None:
    nanogpt(tmp_path / "a.bin", [*range(50), 256])
    with pytest.raises(DataError, match="has the id 256 at token 50, and the vocabulary has 256"):
        _ = open_data(tmp_path / "a.bin", vocab_size=256).fingerprint
    _ = open_data(tmp_path / "a.bin", tokenizer=byte_tokenizer()).fingerprint
    with pytest.raises(DataError, match="the vocabulary has 2;"):
        _ = open_data(tmp_path / "a.bin", tokenizer=character_tokenizer("ab"), vocab_size=300).fingerprint


def test_a_tokenizer_may_be_larger_than_the_planned_vocabulary(text_file: Path, tmp_path: Path) -> None:
    data = opened(text_file, tmp_path / "cache", tokenizer="characters", vocab_size=2)
    assert data.train.read(0, len(data.train)).max() > 2


def test_a_directory_of_the_cache_is_a_source(text_file: Path, tmp_path: Path) -> None:
    data = opened(text_file, tmp_path / "cache")
    (directory,) = (tmp_path / "cache").iterdir()
    again = open_data(directory)
    assert again.fingerprint == data.fingerprint and again.tokenizer is None
    assert again.train.document_ends is not None
    (directory / "tokens.bin").write_bytes(b"")
    with pytest.raises(DataError, match="is damaged"):
        open_data(directory)


def test_the_standard_library_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "lib"))
    (tmp_path / "lib" / "test").mkdir(parents=True)
    for name in ("a.py", "b.py", "test/c.py", "d.txt"):
        (tmp_path / "lib" / name).write_text(TEXT)
    data = opened("stdlib", tmp_path / "cache")
    assert data.train.document_ends is not None and data.validation is not None
    assert len(data.train) + len(data.validation) == 2 * (len(TEXT) + 1)


def test_the_description_states_the_number_of_skipped_files(folder: Path, tmp_path: Path) -> None:
    (folder / "binary").write_bytes(b"\xff")
    (folder / "zeros").write_bytes(b"\0")
    data = opened(folder, tmp_path / "cache")
    assert data.validation is not None and data.train.document_ends is not None
    assert data.description == (
        f"{folder}: {len(data.train):,} tokens (bytes) in {len(data.train.document_ends)} documents "
        f"for training, {len(data.validation):,} for validation, 2 files were skipped: not UTF-8 text"
    )


def test_a_fingerprint_depends_on_the_tokens_of_both_streams(text_file: Path, tmp_path: Path) -> None:
    first = opened(text_file, tmp_path / "cache").fingerprint
    assert first == opened(text_file, tmp_path / "another cache").fingerprint
    text_file.rename(tmp_path / "renamed.txt")
    assert first == opened(tmp_path / "renamed.txt", tmp_path / "cache").fingerprint
    assert first != opened(tmp_path / "renamed.txt", tmp_path / "cache", validation_fraction=0.2).fingerprint
    (tmp_path / "renamed.txt").write_text(TEXT.replace("50", "51").replace("49", "94"))
    assert first != opened(tmp_path / "renamed.txt", tmp_path / "cache").fingerprint


def test_a_fingerprint_depends_on_every_named_validation_set(text_file: Path, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{letter}.txt") for letter in "abc"]
    for path in paths:
        Path(path).write_text(path[-5] * 50)
    one, other, third = paths

    def fingerprint(validation: str | dict[str, str]) -> str:
        return opened(text_file, tmp_path / "cache", validation=validation).fingerprint

    sets = {"one": one, "other": other}
    different = [sets, {"one": one, "other": third}, {"other": other, "one": one}, {"one": one, "b": other}]
    different += [{"one": one}, {"other": one}]
    assert len({fingerprint(validation) for validation in (*different, one)}) == 7
    assert fingerprint(dict(sets)) == fingerprint(sets)


def test_a_fingerprint_without_named_sets_is_that_of_earlier_versions(text_file: Path, tmp_path: Path) -> None:
    data = opened(text_file, tmp_path / "cache")
    assert data.validation is not None
    both = f"{data.train.fingerprint} {data.validation.fingerprint}"
    assert data.fingerprint == hashlib.sha256(both.encode()).hexdigest()


def test_batches_of_text_train_and_evaluate(folder: Path, tmp_path: Path) -> None:
    data = opened(folder, tmp_path / "cache", tokenizer="bpe", vocab_size=300)
    assert data.validation is not None and data.tokenizer is not None and data.tokenizer.vocab_size == 300
    for examples in ("stream", "documents"):
        batch = next(training_batches(data.train, batch_size=3, seq_len=7, seed=5, examples=examples))  # type: ignore[arg-type]
        np.testing.assert_array_equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
    assert sum(1 for _ in evaluation_batches(data.validation, batch_size=3, seq_len=7)) > 1


@pytest.mark.parametrize("spec", ["characters", "bpe"])
def test_a_tokenizer_made_from_text_is_made_once(
    folder: Path, tmp_path: Path, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    documents = find_documents(folder)
    options = {"vocab_size": 300, "cache": tmp_path / "cache"}
    made = make_tokenizer(spec, documents, progress=lambda *about: seen.append(about), **options)  # type: ignore[arg-type]
    assert seen[-1][1:] == (documents.size, documents.size)
    monkeypatch.setattr(tokenizers, "_make_from_text", None)
    kept = make_tokenizer(spec, documents, **options)  # type: ignore[arg-type]
    assert tokenizer_fingerprint(kept) == tokenizer_fingerprint(made)
    assert kept.name == made.name == spec
    monkeypatch.undo()
    (damaged,) = (tmp_path / "cache").glob("tokenizer-*")
    (damaged / "tokenizer.json").write_text("{")
    (damaged / "merges.txt").unlink(missing_ok=True)
    assert tokenizer_fingerprint(make_tokenizer(spec, documents, **options)) == tokenizer_fingerprint(made)  # type: ignore[arg-type]


def test_a_tokenizer_is_loaded_from_a_directory(tmp_path: Path) -> None:
    save_tokenizer(character_tokenizer("abc"), tmp_path / "saved")
    assert make_tokenizer(str(tmp_path / "saved")).encode("cab", special_tokens="as_text") == [2, 0, 1]
    assert make_tokenizer("bytes").encode("a", special_tokens="as_text") == [97]


@pytest.mark.parametrize(
    ("spec", "documents", "vocab_size", "message"),
    [
        ("characters", False, None, "is made from text, but the data is token files"),
        ("bpe", False, 300, "is made from text, but the data is token files"),
        ("bpe", True, None, "give vocab_size"),
        ("nothing", True, None, "must be gpt2, bytes, characters, bpe, or a directory"),
    ],
)
def test_a_tokenizer_that_cannot_be_made_is_an_error(
    text_file: Path, spec: str, documents: bool, vocab_size: int | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        make_tokenizer(spec, find_documents(text_file) if documents else None, vocab_size)


def test_text_needs_a_tokenizer(text_file: Path) -> None:
    with pytest.raises(DataError, match="is text; give a tokenizer"):
        open_data(text_file)


@pytest.fixture
def mixture(text_file: Path, folder: Path, tmp_path: Path) -> Path:
    nanogpt(tmp_path / "tokens.bin", IDS % 256)
    sources = {"lines": (text_file.name, 2), "folder": (folder.name, 1), "ids": ("tokens.bin", 1)}
    path = tmp_path / "mixture.toml"
    path.write_text("".join(f"[{name}]\npath = '{at}'\nweight = {w}\n" for name, (at, w) in sources.items()))
    return path


def test_each_source_of_a_mixture_is_split(mixture: Path, text_file: Path, folder: Path, tmp_path: Path) -> None:
    data = opened(mixture, tmp_path / "cache")
    assert isinstance(data.train, Mixture) and data.train.examples_per_block == (2048, 1024, 1024)
    alone = [opened(source, tmp_path / "cache") for source in (text_file, folder, tmp_path / "tokens.bin")]
    assert [s.fingerprint for s in data.train.streams] == [one.train.fingerprint for one in alone]
    assert [*data.validation_sets] == ["lines", "folder", "ids"]
    for stream, one in zip(data.validation_sets.values(), alone, strict=True):
        assert one.validation is not None and stream.fingerprint == one.validation.fingerprint
    assert data.validation is data.validation_sets["lines"]
    assert data.description.endswith("for validation, lines 50.0%, folder 25.0%, ids 25.0%")


def test_a_mixture_with_another_validation_set_is_not_split(mixture: Path, text_file: Path, tmp_path: Path) -> None:
    data = opened(mixture, tmp_path / "cache", validation={"own": str(text_file)})
    assert [*data.validation_sets] == ["own"] and len(data.train) == sum(
        len(opened(mixture.parent / source, tmp_path / "cache", validation_fraction=0).train)
        for source in ("text.txt", "texts", "tokens.bin")
    )


def test_a_tokenizer_is_trained_on_all_sources_of_a_mixture(mixture: Path, tmp_path: Path) -> None:
    (tmp_path / "texts" / "other.txt").write_text("\N{GREEK SMALL LETTER ALPHA}" * 30)
    tokenizer = opened(mixture, tmp_path / "cache", tokenizer="characters").tokenizer
    assert (
        tokenizer is not None
        and tokenizer.decode(tokenizer.encode("\N{GREEK SMALL LETTER ALPHA}line")) == "\N{GREEK SMALL LETTER ALPHA}line"
    )


def test_a_mixture_is_no_text(mixture: Path) -> None:
    with pytest.raises(DataError, match=r"mixture.toml' describes a mixture, and this command reads text"):
        find_documents(mixture)

"""Saved tokenizers, compared with transformers' on the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from support.models import TINY, huggingface_directory
from support.tokenizers_for_tests import (
    CORPUS,
    END,
    OPENAI_CACHE,
    TEXTS,
    needs_openai_cache,
    of_tiktoken,
    openai_files,
    random_texts,
)
from transformers import AutoTokenizer, GPT2Tokenizer

import bridge
from bridge import CheckpointError, TokenizerError
from bridge.tokenizers.byte_level_bpe import WORDS
from bridge.tokenizers.loading import TOKENIZER_FILES, load_tokenizer, openai_tokenizer
from bridge.tokenizers.tokenizer import Tokenizer

ALL_TEXTS = [*TEXTS, *CORPUS, *random_texts(300)]
SINGLE_BYTES = {bytes([b]): b for b in range(256)}


def trained(special: dict[str, int]) -> Tokenizer:
    """Train BPE on `CORPUS`, with free ids for `special` before the bytes and after the merges."""
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<first>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    theirs.train_from_iterator(CORPUS, trainer)
    byte_of = {name: b for b, name in enumerate(gpt2_bytes())}
    vocab = {token: i for token, i in theirs.get_vocab().items() if token != "<first>"}
    ranks = {bytes(byte_of[c] for c in token): i for token, i in vocab.items()}
    return of_tiktoken("trained", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special)


def gpt2_bytes() -> list[str]:
    """Return the character of each byte in the vocabulary, according to `tokenizers`."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    own = [c for c in alphabet if ord(c) < 256]
    moved = iter(c for c in alphabet if ord(c) >= 256)
    return [chr(b) if chr(b) in own else next(moved) for b in range(256)]


BYTE_LEVEL: dict[str, Callable[[], Tokenizer]] = {
    "bytes": bridge.byte_tokenizer,
    "bytes alone": lambda: of_tiktoken("b", pat_str=WORDS, mergeable_ranks=SINGLE_BYTES, special_tokens={}),
    "BPE": lambda: trained({END: 400}),
    "BPE with END first and unused ids": lambda: trained({END: 0, "<|user|>": 407, "<|pad|>": 405}),
}
CHARACTERS: dict[str, Callable[[], Tokenizer]] = {
    "characters": lambda: bridge.character_tokenizer("".join(ALL_TEXTS)),
}


def kinds(makers: dict[str, Callable[[], Tokenizer]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("make", makers.values(), ids=makers)


def assert_same_ids(theirs: Any, ours: Tokenizer) -> None:
    for text in ALL_TEXTS:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == ours.decode(ids) == text
    assert sorted(theirs.all_special_tokens) == sorted(ours.added)
    for token in ours.added:
        assert theirs(f"a{token}b")["input_ids"] == ours.encode(f"a{token}b")
    assert len(theirs) == len(ours.pipeline()["model"]["vocab"])


@kinds(BYTE_LEVEL | CHARACTERS)
@pytest.mark.parametrize("beside_a_model", [False, True])
def test_transformers_produces_the_same_ids(
    make: Callable[[], Tokenizer], beside_a_model: bool, tmp_path: Path
) -> None:
    """With GPT-2's config.json beside it, AutoTokenizer selects another class with other code."""
    ours = make()
    if beside_a_model:
        huggingface_directory(tmp_path, replace(TINY, vocab_size=ours.vocab_size))
    bridge.save_tokenizer(ours, tmp_path)
    assert_same_ids(AutoTokenizer.from_pretrained(tmp_path), ours)


@kinds(BYTE_LEVEL)
def test_transformers_gpt2_tokenizer_produces_the_same_ids(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    bridge.save_tokenizer(make(), tmp_path)
    theirs = GPT2Tokenizer.from_pretrained(tmp_path)
    assert_same_ids(theirs, make())
    end = END if END in make().added else None
    assert theirs.bos_token == theirs.eos_token == end


@kinds(BYTE_LEVEL | CHARACTERS)
def test_tokenizer_json_alone_is_enough(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    bridge.save_tokenizer(make(), tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = make()
    for text in [*ALL_TEXTS, *(f"a{token} b" for token in ours.added)]:
        ids = ours.encode(text)
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == text


def test_vocab_and_merges_alone_are_enough(tmp_path: Path) -> None:
    bridge.save_tokenizer(trained({END: 400}), tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    assert_same_ids(GPT2Tokenizer.from_pretrained(tmp_path), trained({END: 400}))


def test_transformers_refuses_an_unknown_character_as_we_do(tmp_path: Path) -> None:
    bridge.save_tokenizer(bridge.character_tokenizer("hello"), tmp_path)
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        AutoTokenizer.from_pretrained(tmp_path)("help")
    with pytest.raises(TokenizerError, match="no character 'p'"):
        load_tokenizer(tmp_path, 4).encode("help")


@kinds(BYTE_LEVEL | CHARACTERS)
def test_a_saved_tokenizer_loads_unchanged(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    ours = make()
    bridge.save_tokenizer(ours, tmp_path)
    saved = {file.name for file in tmp_path.iterdir()}
    assert saved <= set(TOKENIZER_FILES), "conversions copy every saved file"
    back = load_tokenizer(tmp_path, ours.vocab_size)
    assert bridge.tokenizer_fingerprint(back) == bridge.tokenizer_fingerprint(ours)
    assert type(back) is type(ours) and back.vocab_size == ours.vocab_size
    for text in ALL_TEXTS:
        assert back.encode(text) == ours.encode(text)
    with pytest.raises(TokenizerError, match=f"has ids up to {ours.vocab_size - 1}"):
        load_tokenizer(tmp_path, ours.vocab_size - 1)


@kinds(BYTE_LEVEL)
def test_all_forms_of_the_files_have_the_same_fingerprint(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    ours = make()
    for form in [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"), ("tokenizer.json",)]:
        directory = tmp_path / form[0]
        bridge.save_tokenizer(ours, directory)
        if form == ("tokenizer.json",):
            (directory / "vocab.json").unlink()
        else:
            (directory / "tokenizer.json").unlink()
            for old, new in zip(("vocab.json", "merges.txt"), form, strict=True):
                (directory / old).rename(directory / new)
        back = load_tokenizer(directory, ours.vocab_size)
        assert bridge.tokenizer_fingerprint(back) == bridge.tokenizer_fingerprint(ours)


def test_a_character_tokenizer_is_copied_with_a_checkpoint(tmp_path: Path) -> None:
    characters = bridge.character_tokenizer("".join(map(chr, range(300, 557))))
    model = huggingface_directory(tmp_path / "model")
    bridge.save_tokenizer(characters, model)
    bridge.save(bridge.load(model), tmp_path / "flax", format="flax")
    back = bridge.load(tmp_path / "flax").tokenizer()
    assert bridge.tokenizer_fingerprint(back) == bridge.tokenizer_fingerprint(characters)


def test_a_tokenizer_of_the_same_files_is_replaced_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("of before")
    bridge.save_tokenizer(bridge.byte_tokenizer(), tmp_path)
    ours = trained({END: 400})
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json exist already; overwrite=True replaces"):
        bridge.save_tokenizer(ours, tmp_path)
    assert contents(tmp_path) == before
    bridge.save_tokenizer(ours, str(tmp_path), overwrite=True)
    assert bridge.tokenizer_fingerprint(load_tokenizer(tmp_path, 401)) == bridge.tokenizer_fingerprint(ours)
    assert contents(tmp_path).keys() == before.keys() and contents(tmp_path)["config.json"] == b"of before"


def test_files_of_another_tokenizer_are_not_removed(tmp_path: Path) -> None:
    bridge.save_tokenizer(trained({END: 400}), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"has files of another tokenizer: vocab\.json, merges\.txt; they would"):
        bridge.save_tokenizer(bridge.character_tokenizer("hello"), tmp_path, overwrite=True)
    assert contents(tmp_path) == before


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_a_file_that_only_has_the_name_of_a_tokenizer_file_is_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("something else")
    with pytest.raises(CheckpointError, match=f"{name} are not a tokenizer that this project can read"):
        bridge.save_tokenizer(bridge.byte_tokenizer(), tmp_path, overwrite=True)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {name: "something else"}


def test_chat_templates_are_saved_and_only_those_of_the_same_names_replaced(tmp_path: Path) -> None:
    bridge.save_tokenizer(bridge.byte_tokenizer(), tmp_path / "source")
    (tmp_path / "source" / "additional_chat_templates").mkdir()
    (tmp_path / "source" / "additional_chat_templates" / "rag.jinja").write_text("new")
    target = tmp_path / "target"
    bridge.save_tokenizer(load_tokenizer(tmp_path / "source", 257), target)
    assert (target / "additional_chat_templates" / "rag.jinja").read_text() == "new"
    (target / "additional_chat_templates" / "rag.jinja").write_text("old")
    bridge.save_tokenizer(load_tokenizer(tmp_path / "source", 257), target, overwrite=True)
    assert (target / "additional_chat_templates" / "rag.jinja").read_text() == "new"
    for name in ("notes.txt", "old.jinja"):
        (target / "additional_chat_templates" / name).write_text("mine")
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            bridge.save_tokenizer(load_tokenizer(tmp_path / "source", 257), target, overwrite=True)
        assert {path.name for path in (target / "additional_chat_templates").iterdir()} == {"rag.jinja", name}
        (target / "additional_chat_templates" / name).unlink()


# What cannot be saved


def refused(**changes: Any) -> Tokenizer:
    return of_tiktoken("odd", **{"pat_str": WORDS, "mergeable_ranks": SINGLE_BYTES, "special_tokens": {}, **changes})


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (
            refused(pat_str=r"\S+|\s+"),
            r"'odd' cannot be saved: it splits text into words by the pattern '\\S\+\|\\s\+', not by GPT-2's",
        ),
        (refused(mergeable_ranks={**SINGLE_BYTES, b"abc": 256}), "the token 'b'abc'' is not a merge of two tokens"),
        (refused(mergeable_ranks={**SINGLE_BYTES, b"abc": 256, b"ab": 257}), "is not a merge of two tokens"),
        (refused(mergeable_ranks={b"a": 0}), "some of the 256 bytes have no token"),
        (refused(special_tokens={"a": 256}), "has a special token with the spelling of an ordinary one"),
        (refused(special_tokens={"Ġ": 256}), "has a special token with the spelling of an ordinary one"),
    ],
)
def test_a_tokenizer_that_the_files_cannot_represent_is_refused(odd: Tokenizer, message: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=message):
        bridge.save_tokenizer(odd, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", "prose"),
        ("tokenizer.json", '{"port": 1}'),
        ("encoder.json", "{}"),
        ("vocab.bpe", ""),
    ],
)
def test_another_file_beside_a_tokenizer_is_kept(tmp_path: Path, name: str, content: str) -> None:
    bridge.save_tokenizer(bridge.byte_tokenizer(), tmp_path)
    (tmp_path / name).write_text(content)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="are not a tokenizer that this project can read"):
        bridge.save_tokenizer(bridge.byte_tokenizer(), tmp_path, overwrite=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_failed_write_keeps_the_old_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(CheckpointError, match=r"file' is not a directory; choose another name"):
        bridge.save_tokenizer(bridge.byte_tokenizer(), tmp_path / "file")
    (tmp_path / "in the way" / "vocab.json" / "x").mkdir(parents=True)
    (tmp_path / "in the way" / "merges.txt").write_text("old")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match=r"vocab\.json, merges\.txt"):
            bridge.save_tokenizer(bridge.byte_tokenizer(), tmp_path / "in the way", overwrite=overwrite)
    assert {file.name for file in (tmp_path / "in the way").rglob("*")} == {"vocab.json", "x", "merges.txt"}


# OpenAI's own


@pytest.mark.thorough
@needs_openai_cache
def test_openais_tokenizer_is_saved_as_openai_wrote_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(OPENAI_CACHE))
    ours = openai_tokenizer()
    bridge.save_tokenizer(ours, tmp_path)
    encoder, merges = openai_files()
    assert (tmp_path / "merges.txt").read_bytes() == merges.read_bytes()
    assert json.loads((tmp_path / "vocab.json").read_bytes()) == json.loads(encoder.read_bytes())
    assert_same_ids(AutoTokenizer.from_pretrained(tmp_path), ours)
    assert bridge.tokenizer_fingerprint(load_tokenizer(tmp_path, 50257)) == bridge.tokenizer_fingerprint(ours)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("length", [65535, 65536, 131_072, 1_000_003])
@pytest.mark.parametrize("space", [" ", "\n", "\u3000"])
def test_very_long_white_space_is_encoded_as_tokenizers_does(space: str, length: int) -> None:
    ours = trained({})
    theirs = tokenizers.Tokenizer.from_str(json.dumps(ours.pipeline()))
    for text in (space * length, f"a{space * length}", f"a{space * length}b"):
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        if length < 100_000:  # the tokenizers package takes seconds for longer texts
            assert ids == theirs.encode(text).ids

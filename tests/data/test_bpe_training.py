"""BPE training, compared with the encoding of the `tokenizers` library."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
from support.tokenizers_for_tests import CORPUS, END, TEXTS, random_texts

import bridge
from bridge import TokenizerError
from bridge.tokenizers.loading import load_tokenizer
from gpt2_jax.data.text.bpe_training import train_bpe

SOURCES = [
    (Path(__file__).parents[2] / name).read_text() for name in ("bridge/parameter_table.py", "bridge/conversion.py")
]
TRAINING = [*CORPUS, *SOURCES, *random_texts(50, seed=1)]
ALL_TEXTS = [*TEXTS, *TRAINING, *random_texts(500)]


@pytest.mark.parametrize("vocab_size", [258, 300, 1000])
def test_ids_are_those_of_the_tokenizers_library(vocab_size: int, tmp_path: Path) -> None:
    ours = train_bpe(TRAINING, vocab_size)
    assert ours.vocab_size == vocab_size
    bridge.save_tokenizer(ours, tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ALL_TEXTS:
        assert ours.encode(text, special_tokens="as_text") == theirs.encode(text).ids, text


def test_merges_are_those_that_the_library_learns() -> None:
    """Compared with the library's own trainer for byte-level BPE, with defaults, on the same corpus."""
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(TRAINING, vocab_size=999, min_frequency=2, show_progress=False)
    ours = train_bpe(TRAINING, 1000)
    assert theirs.get_vocab_size() == 999
    for text in ALL_TEXTS:
        assert ours.encode(text, special_tokens="as_text") == theirs.encode(text).ids, text


def test_the_layout_is_that_of_gpt2() -> None:
    ours = train_bpe(TRAINING, 600)
    tokens = [ours.token_bytes(i) for i in range(600)]
    assert tokens[0] == b"!" and tokens[93] == b"~", "GPT-2 counts the printable bytes first"
    assert sorted(tokens[:256]) == [bytes([b]) for b in range(256)]
    assert all(len(token) > 1 for token in tokens[256:])
    assert tokens[599] == END.encode() and ours.added.keys() == {END}
    assert ours.encode(END) == [599]
    used = {i for text in TRAINING for i in ours.encode(text, special_tokens="as_text")}
    assert max(used) > 500, "late merges are used"


def test_every_text_is_decoded_unchanged() -> None:
    ours = train_bpe(TRAINING, 700)
    for text in ALL_TEXTS:
        assert ours.decode(ours.encode(text, special_tokens="as_text")) == text


def test_words_are_split_as_in_gpt2() -> None:
    """Merges include the space before a word, never the space after it."""
    ours = train_bpe(["the dog the dog the dog's"] * 10, 400)
    tokens = {ours.token_bytes(i) for i in range(256, ours.vocab_size - 1)}
    assert {b" dog", b" the", b"the", b"'s"} <= tokens
    assert not any(b" " in token[1:] for token in tokens)


CODE = """
import sys
sys.path[:0] = ["tests"]
from support.tokenizers_for_tests import random_texts
import bridge
from gpt2_jax.data.text.bpe_training import train_bpe
print(bridge.tokenizer_fingerprint(train_bpe(iter(random_texts(400, seed=3)), 2000)))
"""


def test_the_same_texts_give_the_same_tokenizer_in_any_process() -> None:
    """The library counts with threads and hash maps, which differ between processes."""
    fingerprints = set()
    for seed, threads in [("1", "1"), ("2", "4")]:
        environment = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", CODE],
            env=environment,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        fingerprints.add(done.stdout)
    assert len(fingerprints) == 1
    assert bridge.tokenizer_fingerprint(train_bpe(random_texts(400, seed=3), 2000)) == fingerprints.pop().strip()


def test_another_corpus_gives_another_tokenizer() -> None:
    assert bridge.tokenizer_fingerprint(train_bpe(CORPUS, 300)) != bridge.tokenizer_fingerprint(train_bpe(SOURCES, 300))


def test_a_round_trip_keeps_the_fingerprint(tmp_path: Path) -> None:
    ours = train_bpe(TRAINING, 900)
    bridge.save_tokenizer(ours, tmp_path)
    assert bridge.tokenizer_fingerprint(load_tokenizer(tmp_path, 900)) == bridge.tokenizer_fingerprint(ours)


def test_texts_are_read_one_by_one() -> None:
    def texts() -> Iterator[str]:
        yield from TRAINING

    assert bridge.tokenizer_fingerprint(train_bpe(texts(), 500)) == bridge.tokenizer_fingerprint(
        train_bpe(TRAINING, 500)
    )


@pytest.mark.parametrize(
    ("texts", "n_vocab"),
    [([], 257), ([""], 257), (["ab"], 257), (["ab", "ab"], 258), (["abc abd"], 258), (["the the the"], 260)],
)
def test_a_corpus_too_small_gives_as_many_merges_as_it_has(texts: list[str], n_vocab: int) -> None:
    ours = train_bpe(texts, 5000)
    assert ours.vocab_size == n_vocab
    assert ours.encode(END) == [n_vocab - 1]
    for text in ALL_TEXTS:
        assert ours.decode(ours.encode(text, special_tokens="as_text")) == text


def test_a_vocabulary_of_bytes_alone_has_no_merges() -> None:
    assert train_bpe(TRAINING, 257).vocab_size == 257


@pytest.mark.parametrize("vocab_size", [256, 1, 0, -5])
def test_a_vocabulary_too_small_for_the_bytes_is_refused(vocab_size: int) -> None:
    with pytest.raises(TokenizerError, match=f"a BPE vocabulary of {vocab_size} has no room.*ask for 257 or more"):
        train_bpe(TRAINING, vocab_size)


def test_a_single_text_or_invalid_text_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"give \[text\]"):
        train_bpe("one text", 300)
    with pytest.raises(TokenizerError, match="unpaired surrogate"):
        train_bpe(["fine", "half \ud83d of one"], 300)

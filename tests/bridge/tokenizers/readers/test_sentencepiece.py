"""SentencePiece models, compared with transformers on the same files (tests/files/sentencepiece-0.2.3/write.py)."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from support.refusals import within_budget

from bridge import NoTokenizerError, TokenizerError
from bridge.tokenizers.loading import load_tokenizer
from bridge.tokenizers.readers import sentencepiece

FILES = Path(__file__).parents[3] / "files" / "sentencepiece-0.2.3"
MODELS = sorted(path.name for path in FILES.iterdir() if path.is_dir())
AS_BPE = {"llama", "llama, legacy", "llama without prefix", "reformer", "general, BPE"}


@pytest.mark.parametrize("name", MODELS)
def test_ids_and_text_are_those_of_transformers(name: str) -> None:
    ours = load_tokenizer(FILES / name, 1000)
    expected = json.loads((FILES / name / "expected.json").read_text())
    assert ours.kind == ("BPE" if name in AS_BPE else "Unigram")
    assert {token.content: token.id for token in ours.added.values()} == expected["added"]
    assert {f"{role}_token": token for role, token in ours.special.by_role().items()} == expected["roles"]
    unknown = ours.pipeline()["model"].get("unk_id", ours.id_of(expected["roles"]["unk_token"]))
    for text, ids, decoded in expected["strings"]:
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == decoded
        stream = ours.stream()
        assert "".join([*map(stream.add, ids), stream.flush()]) == decoded
        as_text = ours.encode(text, special_tokens="as_text", add_special_tokens=False)
        assert not {i for token, i in expected["added"].items() if len(token) > 1} - {unknown} & {*as_text}, text


def test_a_model_with_fewer_rows_than_pieces_is_refused() -> None:
    with pytest.raises(TokenizerError, match="has more than 20 pieces"):
        load_tokenizer(FILES / "rinna", 20)


def test_a_model_that_cannot_be_read_is_not_replaced_by_another_tokenizer(tmp_path: Path) -> None:
    shutil.copy(FILES / "rinna" / "spiece.model", tmp_path)
    with pytest.raises(TokenizerError, match=r"has spiece\.model, but the tokenizer class 'None' cannot be read"):
        load_tokenizer(tmp_path, 50257)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "AlbertTokenizer"}')
    with pytest.raises(TokenizerError, match="class 'AlbertTokenizer' cannot be read from it; save the"):
        load_tokenizer(tmp_path, 50257)
    (tmp_path / "spiece.model").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.raises(NoTokenizerError, match="names the tokenizer class 'T5Tokenizer', but has none of its files"):
        load_tokenizer(tmp_path, 50257)


def field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2, len(value)]) + value


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has no pieces"),
    "ends within a number": (b"\x0a\x80", "ends within a number"),
    "an endless number": (b"\xff" * 20, "more than 10 bytes"),
    "a length past the end": (b"\x0a\x7fabc", "a field has 127 bytes, but 3 are left"),
    "a length of 2^63": (b"\x0a" + b"\xff" * 8 + b"\x7f", "are left"),
    "a group": (b"\x0b\x00", "wire type 3"),
    "a piece not UTF-8": (field(1, field(1, b"\xff")), "is not UTF-8"),
    "an infinite score": (field(1, field(1, b"a") + b"\x15\x00\x00\x80\x7f"), "the score of 'a' is inf"),
    "a piece twice": (field(1, field(1, b"a")) * 2, "has a piece twice"),
    "words": (field(1, field(1, b"a")) + field(2, b"\x18\x03"), "of words; only Unigram and BPE are supported; save"),
    "an unknown type": (field(1, field(1, b"a")) + field(2, b"\x18\x09"), "of 9; only Unigram and BPE"),
    "a spelling not UTF-8": (field(2, b"\xea\x02\x01\xff"), "is not UTF-8"),
    "too many pieces": (field(1, b"") * 300_001, "more than 1000 pieces"),
    "text": (b'{"a": 1}', "wire type|are left|no pieces"),
}


@pytest.mark.parametrize(("content", "says"), BAD.values(), ids=BAD)
def test_a_damaged_model_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    with within_budget(), pytest.raises(TokenizerError, match=says):
        sentencepiece.parse(content, "'spiece.model'", 1000)


def test_the_options_of_the_trainer_are_read() -> None:
    """-1 has ten bytes, as protocol buffers sign-extend it to 64 bits."""
    options = b"\x18\x02" + b"\x98\x02\x01" + b"\xc8\x02" + b"\xff" * 9 + b"\x01" + b"\xea\x02\x01?"
    trainer = sentencepiece.parse(field(1, field(1, b"a")) + field(2, options), "here").trainer
    assert trainer == sentencepiece.Trainer(model_type=2, byte_fallback=1, bos_id=-1, unk_piece="?")


def test_merges_join_pieces_in_the_order_of_their_ids() -> None:
    pieces = [(piece, 0.0) for piece in ("abc", "a", "b", "c", "bc", "ab")]
    assert sentencepiece.merges_of(pieces, "here") == [("a", "bc"), ("ab", "c"), ("b", "c"), ("a", "b")]


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        (["a" * 513], "the piece 'a+.*' has 513 characters; the limit is 512"),
        ([letter * n for letter in "ab" for n in range(1, 201)], "have more than .* merges"),
    ],
    ids=["long", "many"],
)
def test_pieces_that_join_in_too_many_ways_are_refused(pieces: list[str], says: str) -> None:
    with within_budget(), pytest.raises(TokenizerError, match=says):
        sentencepiece.merges_of([(piece, 0.0) for piece in pieces], "here")


def test_random_damage_is_refused_or_read(tmp_path: Path) -> None:
    content = (FILES / "rinna" / "spiece.model").read_bytes()
    draw = random.Random(0)
    shutil.copy(FILES / "rinna" / "tokenizer_config.json", tmp_path)
    outcomes = {"refused": 0, "read": 0}
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 1, 4))):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (tmp_path / "spiece.model").write_bytes(damaged[: draw.choice((len(damaged), draw.randrange(len(damaged))))])
        try:
            load_tokenizer(tmp_path, 1000).encode("the quick brown fox")
            outcomes["read"] += 1
        except TokenizerError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 30, outcomes

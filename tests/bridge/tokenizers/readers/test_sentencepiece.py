"""SentencePiece models, compared with what transformers gives with them (tests/files/sentencepiece-0.2.3/write.py)."""

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


@pytest.mark.parametrize("name", MODELS)
def test_ids_and_text_are_those_of_transformers(name: str) -> None:
    ours = load_tokenizer(FILES / name, 1000)
    expected = json.loads((FILES / name / "expected.json").read_text())
    assert ours.kind == "Unigram"
    assert {token.content: token.id for token in ours.added.values()} == expected["added"]
    assert {f"{role}_token": token for role, token in ours.special.by_role().items()} == expected["roles"]
    for text, ids, decoded in expected["strings"]:
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == decoded
        stream = ours.stream()
        assert "".join([*map(stream.add, ids), stream.flush()]) == decoded
        as_text = ours.encode(text, special_tokens="as_text", add_special_tokens=False)
        assert not {i for token, i in expected["added"].items() if i != 2} & {*as_text}, text


def test_a_model_with_fewer_rows_than_pieces_is_refused() -> None:
    with pytest.raises(TokenizerError, match="has more than 20 pieces"):
        load_tokenizer(FILES / "rinna", 20)


def test_no_other_tokenizer_is_assumed_where_a_model_is_not_read(tmp_path: Path) -> None:
    shutil.copy(FILES / "rinna" / "spiece.model", tmp_path)
    with pytest.raises(TokenizerError, match=r"has spiece\.model, but the tokenizer class 'None' cannot be read"):
        load_tokenizer(tmp_path, 50257)
    (tmp_path / "spiece.model").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.raises(NoTokenizerError, match="names the tokenizer class 'T5Tokenizer', but has no file of it"):
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
    "BPE": (field(1, field(1, b"a")) + field(2, b"\x18\x02"), "of the type 2; only Unigram"),
    "too many pieces": (field(1, b"") * 300_001, "more than 1000 pieces"),
    "text": (b'{"a": 1}', "wire type|are left|no pieces"),
}


@pytest.mark.parametrize(("content", "says"), BAD.values(), ids=BAD)
def test_a_damaged_model_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    with within_budget(), pytest.raises(TokenizerError, match=says):
        sentencepiece.parse(content, "'spiece.model'", 1000)


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

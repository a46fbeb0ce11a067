"""Ids and text of every kind of tokenizer, compared with transformers' AutoTokenizer on the same directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizing.driver import compare, prepared
from tokenizing.kinds import KINDS, ROWS
from tokenizing.strings import generated

from bridge import TokenizerError
from bridge.tokenizers.byte_level_bpe import ByteLevelBPE
from bridge.tokenizers.loading import load_tokenizer

STRINGS = 200

BY_TIKTOKEN = {
    *("old_style", "vocab_and_merges_alone", "old_style_with_added_tokens", "with_special_tokens_of_the_map"),
    *("with_prefix_space", "with_bos", "with_bos_and_eos_and_prefix_space", "new_style", "with_plain_added_tokens"),
    *("new_over_old", "with_post_processor"),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    ours, theirs = prepared(kind, tmp_path)
    strings = [*generated(STRINGS, 0, [*ours.added])]
    compare(ours, theirs, strings)
    assert isinstance(ours, ByteLevelBPE) == (kind in BY_TIKTOKEN)
    assert {f"{role}_token": token for role, token in ours.special.by_role().items()} == theirs.special_tokens_map
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    for text in strings[:60]:
        ids = ours.encode(text, add_special_tokens=False)
        encoded = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        assert ours.encode_with_offsets(text, add_special_tokens=False) == (ids, encoded["offset_mapping"])


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_text_is_the_decoded_text(tmp_path: Path, kind: str) -> None:
    ours, _ = prepared(kind, tmp_path)
    for text in generated(STRINGS, 1, [*ours.added]):
        ids = ours.encode(text)
        stream = ours.stream()
        pieces = [*map(stream.add, ids), stream.flush()]
        assert "".join(pieces) == ours.decode(ids), (text, ids)


def test_the_token_of_a_byte_encodes_text_even_if_it_is_an_added_token(tmp_path: Path) -> None:
    ours, _ = prepared("bpe_with_byte_fallback", tmp_path)
    text, byte = "the ÿ", "<0xC3>"
    expected = ours.encode(text)
    assert ours.id_of(byte) in expected
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["added_tokens"].append({**stored["added_tokens"][0], "content": byte, "id": ours.id_of(byte)})
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    again = load_tokenizer(tmp_path, ROWS)
    assert byte in again.added
    assert again.encode(text, special_tokens="as_text") == again.encode(text) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_are_text_or_an_error_on_request(tmp_path: Path, kind: str) -> None:
    ours, _ = prepared(kind, tmp_path)
    unknown = None if ours.special.unk is None else ours.id_of(ours.special.unk)
    # A token of one character may have the spelling of a byte.
    reached = {token.id for token in ours.added.values() if len(token.content) > 1} - {unknown}
    for text in generated(STRINGS, 2, [*ours.added]):
        as_text = ours.encode(text, special_tokens="as_text", add_special_tokens=False)
        assert not reached & {*as_text}, text
        if ours.encode(text, add_special_tokens=False) == as_text:
            assert ours.encode(text, special_tokens="error", add_special_tokens=False) == as_text
        else:
            with pytest.raises(TokenizerError, match="the text contains the token"):
                ours.encode(text, special_tokens="error")

"""Ids and text of every kind of tokenizer, compared with transformers' AutoTokenizer on the same directory."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from support.models import TINY
from support.tokenizers_for_tests import END
from tokenizing.directories import TEXTS
from tokenizing.driver import compare, compare_random_directory, compare_roles, prepared, read_by_both
from tokenizing.kinds import (
    KINDS,
    ROWS,
    bert_vocabulary,
    write_json,
    write_vocab_and_merges,
)
from tokenizing.strings import generated
from transformers import AutoTokenizer

from bridge import TokenizerError, character_tokenizer, save_tokenizer
from bridge.tokenizers.byte_level_bpe import ByteLevelBPE
from bridge.tokenizers.characters import CharacterTokenizer
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
    compare_roles(ours, theirs)
    for text in strings[:60]:
        ids = ours.encode(text, add_special_tokens=False)
        encoded = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        assert ours.encode_with_offsets(text, add_special_tokens=False) == (ids, encoded["offset_mapping"])


@pytest.mark.parametrize("seed", range(40))
def test_random_files_are_combined_as_transformers_combines_them(tmp_path: Path, seed: int) -> None:
    compare_random_directory(tmp_path, seed)


MAP, CONFIG, ADDED, JSON = "special_tokens_map.json", "tokenizer_config.json", "added_tokens.json", "tokenizer.json"
GENERAL = {"tokenizer_class": "PreTrainedTokenizerFast"}
FLAGS = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)


def an_object(content: str, **flags: Any) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": content, **FLAGS, **flags}


ROLES_IN_ORDER_OF_THE_ALPHABET = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "image_token": "<mask>",
    "mask_token": "<b>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}

FILES: dict[str, dict[str, Any]] = {
    "new tokens in the order of the roles": {MAP: ROLES_IN_ORDER_OF_THE_ALPHABET},
    "new tokens of the settings in the order of the roles": {CONFIG: ROLES_IN_ORDER_OF_THE_ALPHABET},
    "the default role of an added token": {ADDED: {END: 407}},
    "the default role of a token of the decoder": {
        CONFIG: {"added_tokens_decoder": {"407": {"content": END, "normalized": True}}}
    },
    "an own role of an added token": {ADDED: {"<a>": 408}, CONFIG: {"image_token": "<a>"}},
    "a role of an added token, given as an object in the settings": {
        ADDED: {"<a>": 408},
        CONFIG: {"bos_token": an_object("<a>")},
    },
    "the role of a token of tokenizer.json that is not special": {
        JSON: [{"id": 408, "special": False, **FLAGS, "content": "</s>"}],
        CONFIG: {**GENERAL, "bos_token": "</s>"},
    },
    "an own role of a token of tokenizer.json that is not special": {
        JSON: [{"id": 408, "special": False, **FLAGS, "content": "<b>"}],
        CONFIG: {**GENERAL, "extra_special_tokens": {"image_token": "<b>"}},
    },
    "a token that only tokenizer.json calls special": {
        JSON: [{"id": 408, "special": True, **FLAGS, "content": "<mask>"}],
        CONFIG: {**GENERAL, "added_tokens_decoder": {"408": {"content": "<mask>", "special": False}}},
    },
    "additional special tokens in both files": {
        CONFIG: {"additional_special_tokens": ["<b>"]},
        MAP: {"additional_special_tokens": ["<a>"]},
    },
    "additional special tokens in the map alone": {MAP: {"additional_special_tokens": ["<b>", "<a>"]}},
    "extra special tokens in both files": {
        CONFIG: {"extra_special_tokens": ["<b>"]},
        MAP: {"extra_special_tokens": ["<a>", {"content": "cat", "single_word": True}]},
    },
    "extra special tokens of both names": {
        CONFIG: {"additional_special_tokens": ["<a>"], "extra_special_tokens": {"boi_token": "<b>"}}
    },
    "an own role in both files": {CONFIG: {"image_token": "的"}, MAP: {"image_token": "</s>"}},
    "one spelling in two roles, first with flags": {
        CONFIG: {"bos_token": an_object("the", lstrip=True), "pad_token": "the"}
    },
    "one spelling in two roles, last with flags": {
        CONFIG: {"bos_token": "é", "sep_token": an_object("é", single_word=True)}
    },
    "one spelling in three roles, first and last with flags": {
        CONFIG: {"bos_token": an_object("the", lstrip=True), "sep_token": "the"},
        MAP: {"pad_token": {"content": "the", "lstrip": True, "normalized": False}},
    },
    "an own role that is an object": {CONFIG: {"image_token": an_object("<b>", lstrip=True)}},
    "an own role that is an object without a type": {CONFIG: {"image_token": {"content": "<b>"}}},
    "a token whose object says neither special nor normalized": {
        CONFIG: {"pad_token": {"__type": "AddedToken", "content": "the"}}
    },
    "padding": {JSON: [], CONFIG: GENERAL, "padding": "<pad>"},
}


@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
def test_roles_and_added_tokens_are_those_of_transformers(tmp_path: Path, files: dict[str, Any]) -> None:
    write_vocab_and_merges(tmp_path)
    files = dict(files)
    if JSON in files:
        stored = load_tokenizer(tmp_path, ROWS).pipeline() | {"added_tokens": files[JSON], "post_processor": None}
        padding = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
        if pad := files.pop("padding", None):
            stored["padding"] = padding | {"pad_type_id": 0, "pad_token": pad}
        files[JSON] = stored
    for name, content in files.items():
        write_json(tmp_path / name, content)
    ours, theirs = read_by_both(tmp_path)
    compare(ours, theirs, [*TEXTS])
    compare_roles(ours, theirs)
    assert {*ours.special.additional} == {*theirs.extra_special_tokens}


@pytest.mark.parametrize("roles", [{}, {"eos_token": "\n"}, {"pad_token": "<pad>", "eos_token": "</s>"}])
def test_a_tokenizer_of_characters_has_the_special_tokens_of_its_files(tmp_path: Path, roles: dict[str, str]) -> None:
    save_tokenizer(character_tokenizer("hello \n<pad>/s"), tmp_path)
    settings = json.loads((tmp_path / CONFIG).read_text())
    write_json(tmp_path / CONFIG, settings | roles)
    ours, theirs = read_by_both(tmp_path)
    compare(ours, theirs, ["hell<pad></s>\n", "", "</s>"])
    compare_roles(ours, theirs)
    assert isinstance(ours, CharacterTokenizer) == (not roles)


@pytest.mark.parametrize("null", [("cls_token",), ("sep_token",), ("cls_token", "sep_token"), ()])
def test_null_roles_of_bert_put_ids_around_a_text(tmp_path: Path, null: tuple[str, ...]) -> None:
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in bert_vocabulary()))
    write_json(tmp_path / CONFIG, {"tokenizer_class": "BertTokenizer", **dict.fromkeys(null)})
    ours, theirs = read_by_both(tmp_path)
    compare(ours, theirs, ["我爱北京 the dogs", "", "[SEP] hello-world [MASK]"])
    compare_roles(ours, theirs)


def test_an_unknown_token_that_is_not_in_berts_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in bert_vocabulary()))
    write_json(tmp_path / CONFIG, {"tokenizer_class": "BertTokenizer", "unk_token": "<unk>"})
    with pytest.raises(TokenizerError, match=r"the vocabulary has no token for unknown words, such as \[UNK\]"):
        load_tokenizer(tmp_path, ROWS)


def test_thousands_of_added_tokens_are_found_as_fast_as_by_transformers(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=14)) for _ in range(3000)]
    size = write_vocab_and_merges(tmp_path)
    write_json(tmp_path / ADDED, {word: size + i for i, word in enumerate(words)})
    (tmp_path / "config.json").write_text(json.dumps({**TINY.to_hf(), "vocab_size": size + 3000}))
    ours, theirs = load_tokenizer(tmp_path, size + 3000), AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(ours, ByteLevelBPE)
    text = " ".join(draw.choice(words) + draw.choice(words)[:9] for _ in range(2000))
    assert ours.encode(text[:500]) == theirs(text[:500])["input_ids"]
    times = []
    for encode in (ours.encode, theirs):
        start = time.process_time()
        encode(text)
        times.append(time.process_time() - start)
    assert times[0] < 3 * times[1]


@pytest.mark.parametrize("count", [3, 200])
def test_many_added_tokens_are_matched_like_a_few(tmp_path: Path, count: int) -> None:
    """Normalized tokens are matched second, and the longest match at the leftmost position is used."""
    contents = ["ab", "abc", "bcd", "<x>", "é的", *(f"<{i}>" for i in range(200))][:count]
    size = write_vocab_and_merges(tmp_path)
    decoder = {str(size + i): {**FLAGS, "content": t, "normalized": i % 2 == 0} for i, t in enumerate(contents)}
    write_json(tmp_path / CONFIG, {"added_tokens_decoder": decoder})
    ours, theirs = read_by_both(tmp_path)
    assert isinstance(ours, ByteLevelBPE)
    compare(ours, theirs, ["abcd ab abc", "xabcd<x>é的<7><17>", "", "的é的<17", "ab" * 50, " é 的\n<x> <x>"])


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

"""WordPiece in BERT's `vocab.txt`, as transformers' `BertTokenizer` builds it. Chinese GPT-2s use it, for example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bridge.errors import TokenizerError
from bridge.tokenizers.added_tokens import Declared
from bridge.tokenizers.post_processors import template
from bridge.tokenizers.tokenizer import AddedToken, SpecialTokens, tokenizer_json
from bridge.tokenizers.validation import flag_of

VOCAB = "vocab.txt"
CLASSES = ("BertTokenizer",)
DEFAULTS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}

_IDS_OF_NULL = {"cls_token": 2, "sep_token": 3}
"""The ids that `BertTokenizer` puts around a text for null roles. If both roles are null, it uses the last id twice."""
_PREFIX = "##"
_LONGEST_WORD = 100  # characters; the default of the tokenizers package
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"


def vocabulary(text: str) -> dict[str, int]:
    """Return token -> id. The id is the number of the token's line, from 0. The last of several equal lines counts."""
    return {line.rstrip(_WHITE_SPACE): i for i, line in enumerate(text.removesuffix("\n").split("\n"))}


def pipeline(
    vocab: Mapping[str, int],
    ids: Mapping[str, int],
    added: Sequence[AddedToken],
    special: SpecialTokens,
    declared: Declared,
) -> dict[str, Any]:
    """Return the content of the `tokenizer.json` of a `BertTokenizer`.

    Args:
        ids: spelling -> id of the vocabulary and the added tokens.
        declared: what the files say about special tokens, with the settings of `tokenizer_config.json`.
    """
    where = declared.where
    lower_case, chinese, strip_accents = (
        flag_of(declared.settings, name, default, where)
        for name, default in (("do_lower_case", True), ("tokenize_chinese_chars", True), ("strip_accents", None))
    )
    if special.unk not in vocab:
        raise TokenizerError(f"{where}: the vocabulary has no token for unknown words, such as [UNK]")
    before: list[str] = []
    after: list[str] = []
    ids_around: dict[str, int] = {}
    for side, role, content in ((before, "cls_token", special.cls), (after, "sep_token", special.sep)):
        if content is not None or declared.is_null(role):
            side.append(str(content))
            ids_around[str(content)] = _IDS_OF_NULL[role] if content is None else ids[content]
    return tokenizer_json(
        {
            "type": "WordPiece",
            "unk_token": special.unk,
            "continuing_subword_prefix": _PREFIX,
            "max_input_chars_per_word": _LONGEST_WORD,
            "vocab": vocab,
        },
        added,
        normalizer={
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": chinese,
            "strip_accents": strip_accents,
            "lowercase": lower_case,
        },
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor=template(before, after, ids_around),
        decoder={"type": "WordPiece", "prefix": _PREFIX, "cleanup": True},
    )

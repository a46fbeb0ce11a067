"""Byte-level BPE in the metadata of a GGUF file, under llama.cpp's keys.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#ggml and llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bridge.containers.gguf import Array, Value, boolean, int32s, shown, string, strings, uint32
from bridge.errors import TokenizerError, quoted
from bridge.tokenizers.byte_level_bpe import (
    END_OF_TEXT,
    ByteLevelBPE,
    printable_bytes,
    ranks_and_merges,
    require_all_bytes,
    spelling_of,
)
from bridge.tokenizers.tokenizer import AddedToken, SpecialTokens
from bridge.tokenizers.validation import pairs_of, require_distinct_ids, require_special_tokens

MODEL = "tokenizer.ggml.model"
TOKENS = "tokenizer.ggml.tokens"
NO_TOKENIZER = (b"none", b"no_vocab")
"""Values of `MODEL` for a file without a tokenizer. llama.cpp then takes the vocabulary size from another key."""

_PRE = "tokenizer.ggml.pre"
_TYPES = "tokenizer.ggml.token_type"
_MERGES = "tokenizer.ggml.merges"
# The pre-tokenizer. llama.cpp added the key in spring 2024. A missing key and "default" mean the same.
_GPT2S_WORDS = (b"gpt-2", b"default")
_ROLES = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "sep": "tokenizer.ggml.seperator_token_id",  # llama.cpp's spelling
    "pad": "tokenizer.ggml.padding_token_id",
    "mask": "tokenizer.ggml.mask_token_id",
}
_ADD_BOS, _ADD_EOS = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"
_ADD_SPACE = "tokenizer.ggml.add_space_prefix"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama_token_type


def metadata_of(tokenizer: ByteLevelBPE, rows: int) -> dict[str, bytes]:
    """Return the keys that store a byte-level BPE with GPT-2's pre-tokenizer.

    There is one entry for each of the `rows` of the vocabulary: llama.cpp derives the vocabulary size from the number
    of entries. Ids without a token get an unused token, spelled as in convert_hf_to_gguf.py. Raises
    `TokenizerError` for a tokenizer that GGUF cannot store.
    """
    ranks, named = tokenizer.ranks, f"the tokenizer {quoted(tokenizer.name)}"
    if tokenizer.max_token_id >= rows:
        raise TokenizerError(
            f"{named} has ids up to {tokenizer.max_token_id}, but the model's vocabulary has only {rows}; the "
            "tokenizer belongs to another model"
        )
    require_all_bytes(ranks, named)
    spelled = {token: spelling_of(token) for token in ranks}
    added = tokenizer.added.values()
    tokens = {i: f"[PAD{i}]" for i in range(rows)}
    tokens |= {i: token for token, i in tokenizer.unused.items()}
    tokens |= {i: spelled[token] for token, i in ranks.items()} | {token.id: token.content for token in added}
    if len(set(tokens.values())) < rows:
        raise TokenizerError(f"{named} has two tokens with the same spelling; GGUF cannot store both")
    types = dict.fromkeys(range(rows), _UNUSED) | dict.fromkeys(ranks.values(), _NORMAL)
    types |= dict.fromkeys(tokenizer.unused.values(), _CONTROL)
    types |= {token.id: _CONTROL if token.special else _USER_DEFINED for token in added}
    metadata = {
        MODEL: string("gpt2"),
        _PRE: string("gpt-2"),
        TOKENS: strings(list(tokens.values())),
        _TYPES: int32s(list(types.values())),
        _MERGES: strings([f"{spelled[first]} {spelled[second]}" for first, second in tokenizer.merges]),
    }
    for role, key in _ROLES.items():
        token = getattr(tokenizer.special, role)
        if token is not None and (found := tokenizer.id_of(token)) is not None:
            metadata[key] = uint32(found)
    if tokenizer.around[0] or tokenizer.around[1]:
        metadata |= {_ADD_BOS: boolean(bool(tokenizer.around[0])), _ADD_EOS: boolean(bool(tokenizer.around[1]))}
    if tokenizer.add_prefix_space:
        metadata[_ADD_SPACE] = boolean(True)
    return metadata


def tokenizer_of(metadata: Mapping[str, Value], rows: int, where: str) -> ByteLevelBPE:
    """Return the tokenizer that `metadata` contains.

    Raises `TokenizerError`, with `where` as a prefix, for a tokenizer that is not byte-level BPE with GPT-2's
    pre-tokenizer or that has ids beyond the `rows` of the vocabulary.
    """
    model, pre = metadata.get(MODEL), metadata.get(_PRE, b"default")
    if model != b"gpt2" or pre not in _GPT2S_WORDS:
        raise TokenizerError(
            f"{where}: the tokenizer is {shown(model)} with the pre-tokenizer {shown(pre)}; only GPT-2's byte-level "
            f"BPE is supported ({MODEL} 'gpt2', {_PRE} 'gpt-2')"
        )
    tokens = _texts(metadata, TOKENS, rows, where)
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        raise TokenizerError(f"{where}: {TOKENS} has a token twice")
    types = _types(metadata, len(tokens), where)
    pairs = [tuple(merge.split(" ")) for merge in _texts(metadata, _MERGES, rows, where)]
    used = {token: i for token, i in ids.items() if types[i] != _UNUSED}
    # A byte or a merge may also be an added token.
    symbols = {*map("".join, pairs), *printable_bytes()}
    ordinary = {t: i for t, i in used.items() if types[i] not in (_CONTROL, _USER_DEFINED) or t in symbols}
    require_distinct_ids(ordinary, where)
    ranks, merges = ranks_and_merges(ordinary, pairs_of(pairs, where), where)
    # Tokens that are neither bytes nor merges are special, like control tokens, unless they are user-defined.
    taken = {i for i in ranks.values() if types[i] not in (_CONTROL, _USER_DEFINED)}
    added = [AddedToken(t, i, special=types[i] != _USER_DEFINED) for t, i in used.items() if i not in taken]
    require_special_tokens({token.content: token.id for token in added}, ordinary, where)
    return ByteLevelBPE(
        "gguf",
        ranks,
        added,
        _special(metadata, tokens),
        around=_around(metadata, len(tokens)),
        add_prefix_space=metadata.get(_ADD_SPACE) is True,
        merges=merges,
    )


def _special(metadata: Mapping[str, Value], tokens: Sequence[str]) -> SpecialTokens:
    """Return the special tokens that the keys name, or `<|endoftext|>` if the keys are missing."""
    roles: dict[str, Any] = {}
    for role, key in _ROLES.items():
        value = metadata.get(key)
        if type(value) is int and 0 <= value < len(tokens):
            roles[role] = tokens[value]
    if not roles and END_OF_TEXT in tokens:
        roles = {"bos": END_OF_TEXT, "eos": END_OF_TEXT}
    return SpecialTokens(**roles)


def _around(metadata: Mapping[str, Value], count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    sides: list[tuple[int, ...]] = []
    for flag, role in ((_ADD_BOS, "bos"), (_ADD_EOS, "eos")):
        value = metadata.get(_ROLES[role])
        is_added = metadata.get(flag) is True and type(value) is int and 0 <= value < count
        sides.append((value,) if is_added and isinstance(value, int) else ())
    return sides[0], sides[1]


def _types(metadata: Mapping[str, Value], count: int, where: str) -> list[Any]:
    types = metadata.get(_TYPES)
    if types is None:
        return [_NORMAL] * count
    if not isinstance(types, Array) or types.type not in ("int32", "uint32") or types.count != count:
        raise TokenizerError(f"{where}: {_TYPES} is not an array of {count} integers, one for each token")
    return types.read()


def _texts(metadata: Mapping[str, Value], key: str, rows: int, where: str) -> list[str]:
    """Return an array of strings, tokens or merges. Raises if it has more entries than the vocabulary has rows."""
    array = metadata.get(key)
    if not isinstance(array, Array) or array.type != "string":
        raise TokenizerError(f"{where}: {key} is {'missing' if array is None else 'not an array of strings'}")
    if array.count > rows:
        raise TokenizerError(
            f"{where}: {key} has {array.count} entries, but the model's vocabulary has only {rows}; the "
            "tokenizer belongs to another model"
        )
    try:
        return [text.decode() for text in array.read()]
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{where}: {key} contains {quoted(error.object)}, which is not UTF-8") from None

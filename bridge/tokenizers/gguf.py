"""Byte-level BPE in the metadata of a GGUF file, under llama.cpp's keys.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#ggml and llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bridge.containers.gguf import Array, Value, int32s, shown, string, strings, uint32
from bridge.errors import TokenizerError, quoted
from bridge.tokenizers.byte_level_bpe import END_OF_TEXT, byte_level_bpe, merges_of, printable_bytes, require_all_bytes

if TYPE_CHECKING:
    import tiktoken

MODEL = "tokenizer.ggml.model"
TOKENS = "tokenizer.ggml.tokens"
NO_TOKENIZER = (b"none", b"no_vocab")
"""Values of `MODEL` for a file without a tokenizer. llama.cpp then takes the vocabulary size from another key."""

_PRE = "tokenizer.ggml.pre"
_TYPES = "tokenizer.ggml.token_type"
_MERGES = "tokenizer.ggml.merges"
# The pre-tokenizer. llama.cpp added the key in spring 2024. A missing key and "default" mean the same.
_GPT2S_WORDS = (b"gpt-2", b"default")
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama_token_type


def metadata_of(encoding: tiktoken.Encoding, rows: int) -> dict[str, bytes]:
    """Return the keys that store `encoding`, which is byte-level BPE with GPT-2's pre-tokenizer.

    There is one entry for each of the `rows` of the vocabulary, because llama.cpp derives the vocabulary size from the
    number of entries. Ids without a token get an unused token, spelled as in convert_hf_to_gguf.py. Raises
    `TokenizerError` for a tokenizer that GGUF cannot store.
    """
    ranks, special, named = (
        encoding._mergeable_ranks,
        encoding._special_tokens,
        f"the tokenizer {quoted(encoding.name)}",
    )
    if encoding.max_token_value >= rows:
        raise TokenizerError(
            f"{named} has ids up to {encoding.max_token_value}, but the model's vocabulary has only {rows}; they do "
            "not belong together"
        )
    require_all_bytes(ranks, named)
    character_of = {byte: character for character, byte in printable_bytes().items()}
    spelled = {token: "".join(map(character_of.__getitem__, token)) for token in ranks}
    tokens = {i: f"[PAD{i}]" for i in range(rows)}
    tokens |= {i: spelled[token] for token, i in ranks.items()} | {i: token for token, i in special.items()}
    if len(set(tokens.values())) < rows:
        raise TokenizerError(f"{named} has two tokens with the same spelling; GGUF cannot store both")
    types = dict.fromkeys(range(rows), _UNUSED)
    types |= dict.fromkeys(ranks.values(), _NORMAL) | dict.fromkeys(special.values(), _CONTROL)
    metadata = {
        MODEL: string("gpt2"),
        _PRE: string("gpt-2"),
        TOKENS: strings(list(tokens.values())),
        _TYPES: int32s(list(types.values())),
        _MERGES: strings([f"{spelled[first]} {spelled[second]}" for first, second in merges_of(ranks)]),
    }
    if END_OF_TEXT in special:
        ends = ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id")
        metadata |= dict.fromkeys(ends, uint32(special[END_OF_TEXT]))
    return metadata


def tokenizer_of(metadata: Mapping[str, Value], rows: int, where: str) -> tiktoken.Encoding:
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
    special = {token: i for token, i in ids.items() if types[i] in (_CONTROL, _USER_DEFINED)}
    ordinary = {token: i for token, i in ids.items() if token not in special and types[i] != _UNUSED}
    merges = [tuple(merge.split(" ")) for merge in _texts(metadata, _MERGES, rows, where)]
    return byte_level_bpe("gguf", ordinary, merges, special, where)


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
            f"{where}: {key} has {array.count} entries, but the model's vocabulary has only {rows}; they do not "
            "belong together"
        )
    try:
        return [text.decode() for text in array.read()]
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{where}: {key} contains {quoted(error.object)}, which is not UTF-8") from None

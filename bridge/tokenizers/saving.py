"""Write tokenizers as Hugging Face's files, which `bridge.tokenizers.loading` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.errors import CheckpointError, TokenizerError, quoted
from bridge.storage.atomic_writes import replace_files
from bridge.storage.companions import MOST_TOKENS, checked_companion
from bridge.tokenizers.byte_level_bpe import (
    END_OF_TEXT,
    SPELLINGS_OF_WORDS,
    merges_of,
    printable_bytes,
    require_all_bytes,
)
from bridge.tokenizers.loading import (
    CHARACTERS_APART,
    NO_LIMIT,
    TOKENIZER_FILES,
    VOCAB_AND_MERGES,
    from_tokenizer_json,
    load_tokenizer,
)

if TYPE_CHECKING:
    import tiktoken

    from bridge.tokenizers.characters import CharacterEncoding

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def save_tokenizer(encoding: tiktoken.Encoding, directory: str | Path, *, overwrite: bool = False) -> None:
    """Write `encoding` into `directory`, so that transformers' AutoTokenizer produces the same ids.

    Byte-level BPE is written as `vocab.json`, `merges.txt` and `tokenizer.json`, single characters as
    `tokenizer.json`; each with a `tokenizer_config.json`. No other file of the directory changes.

    Args:
        encoding: the tokenizer to write.
        directory: the directory to write to.
        overwrite: replace the tokenizer in the directory. Tokenizer files that are not rewritten are removed. Without
            `overwrite`, a directory with tokenizer files is an error.

    Raises:
        TokenizerError: the files cannot represent the tokenizer. Nothing is written.
        CheckpointError: the directory has tokenizer files that may not be replaced, or cannot be written to.
    """
    from bridge.tokenizers.characters import CharacterEncoding

    files = _of_characters(encoding) if isinstance(encoding, CharacterEncoding) else _of_byte_level_bpe(encoding)
    directory = Path(directory)
    existing = [name for name in TOKENIZER_FILES if os.path.lexists(directory / name)]
    if existing and not (overwrite and _is_tokenizer(directory, existing)):
        why = (
            "are not a tokenizer that this project can read"
            if overwrite
            else "exist already; overwrite=True replaces them"
        )
        raise CheckpointError(
            f"{quoted(directory)}: {', '.join(existing)} {why}; choose another directory, or move them away"
        )
    replace_files(directory, files, remove=existing)


def _is_tokenizer(directory: Path, existing: Sequence[str]) -> bool:
    """Whether the files `existing` are regular files of one tokenizer that this project reads."""
    pairs = [pair for pair in VOCAB_AND_MERGES if {*pair} & {*existing}]
    if len(pairs) > 1 or any((directory / name).is_symlink() for name in existing):
        return False
    try:
        load_tokenizer(directory, NO_LIMIT)
        for name in existing:
            checked_companion(directory, name, MOST_TOKENS)
        return "tokenizer.json" not in existing or from_tokenizer_json(directory, MOST_TOKENS) is not None
    except (TokenizerError, CheckpointError):
        return False


def _of_byte_level_bpe(encoding: tiktoken.Encoding) -> dict[str, str]:
    ranks, special, named = encoding._mergeable_ranks, encoding._special_tokens, quoted(encoding.name)
    if encoding._pat_str not in SPELLINGS_OF_WORDS:
        raise TokenizerError(
            f"the tokenizer {named} cannot be saved: it splits text into words by the pattern "
            f"{quoted(encoding._pat_str)}, not by GPT-2's, so transformers' GPT-2 tokenizer would produce other ids"
        )
    require_all_bytes(ranks, f"the tokenizer {named}")
    name_of = {byte: character for character, byte in printable_bytes().items()}
    spelled = {token: "".join(map(name_of.__getitem__, token)) for token in sorted(ranks, key=ranks.__getitem__)}
    vocab = {spelled[token]: ranks[token] for token in spelled} | special
    if len(vocab) < len(ranks) + len(special):
        raise TokenizerError(
            f"the tokenizer {named} has a special token with the spelling of an ordinary one; vocab.json cannot store "
            "both"
        )
    merges = [f"{spelled[first]} {spelled[second]}" for first, second in merges_of(ranks)]
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    return {
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer.json": _tokenizer_json(model, _BYTE_LEVEL, _BYTE_LEVEL, special),
        "tokenizer_config.json": json.dumps(_gpt2_settings(special), indent=2) + "\n",
    }


def _of_characters(encoding: CharacterEncoding) -> dict[str, str]:
    vocab = {token.decode(): i for token, i in encoding._mergeable_ranks.items()}
    # The unknown token is not in the vocabulary, so that transformers rejects unknown characters, as this project does.
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unknown>"}
    # GPT2Tokenizer would split text into words; this class uses tokenizer.json unchanged.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return {
        "tokenizer.json": _tokenizer_json(model, CHARACTERS_APART, {"type": "Fuse"}, {}),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


def _gpt2_settings(special: Mapping[str, int]) -> dict[str, Any]:
    end = END_OF_TEXT if END_OF_TEXT in special else None  # GPT2Tokenizer adds it otherwise
    settings: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer"}
    settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)
    others = [token for token in special if token != end]
    return settings | ({"additional_special_tokens": others} if others else {})


def _tokenizer_json(
    model: Mapping[str, Any], pre_tokenizer: Mapping[str, Any], decoder: Mapping[str, Any], special: Mapping[str, int]
) -> str:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    parts = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": special[token], "content": token, **flags} for token in special],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
    return json.dumps(parts, ensure_ascii=False)

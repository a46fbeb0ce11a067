"""Tokenizers as `tiktoken.Encoding`: read from a checkpoint's directory, or built from bytes or characters.

GPT-2's tokenizer is byte-level BPE. It is stored as `vocab.json` and `merges.txt` (`encoder.json` and `vocab.bpe` in
OpenAI's own release), or inside `tokenizer.json`. `bridge.tokenizers.saving` writes these files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.errors import NoTokenizerError, TokenizerError, quoted
from bridge.storage.companions import MOST_TOKENS, decoded, has_companion, read_companion, read_json_companion
from bridge.tokenizers.byte_level_bpe import END_OF_TEXT, SPELLINGS_OF_WORDS, WORDS, byte_level_bpe
from bridge.tokenizers.validation import require_plain_model, require_special_tokens

if TYPE_CHECKING:
    import tiktoken

VOCAB_AND_MERGES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
"""Hugging Face's names and OpenAI's for the same two files."""

ADDED_TOKENS = "added_tokens.json"

TOKENIZER_FILES = (
    *VOCAB_AND_MERGES[0],
    *VOCAB_AND_MERGES[1],
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    ADDED_TOKENS,
)
"""The tokenizer files that are copied with a checkpoint."""

OPENAI_VOCAB_SIZE = 50257
"""A model with exactly this vocabulary size uses OpenAI's tokenizer, which tiktoken calls "gpt2"."""

NO_LIMIT = 2**31
"""The assumed vocabulary size of a tokenizer whose model is unknown."""

CHARACTERS_APART = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
"""The pre-tokenizer in a `tokenizer.json` of single characters."""


def load_tokenizer(directory: Path, vocab_size: int) -> tiktoken.Encoding:
    """Return the tokenizer saved in `directory`, or OpenAI's if there is none and the vocabulary has its size.

    Raises `TokenizerError` if there is no tokenizer, if it is neither GPT-2's byte-level BPE nor one of single
    characters, or if it has ids outside the model's vocabulary.
    """
    encoding = _from_vocab_and_merges(directory, vocab_size) or from_tokenizer_json(directory, vocab_size)
    if encoding is None and vocab_size == OPENAI_VOCAB_SIZE:
        encoding = openai_tokenizer()
    if encoding is None:
        raise NoTokenizerError(
            f"{quoted(directory)} has no tokenizer: neither vocab.json with merges.txt nor tokenizer.json, and a "
            f"vocabulary of {vocab_size} is not OpenAI's; put the files there, or work with token ids"
        )
    if encoding.max_token_value >= vocab_size:
        raise TokenizerError(
            f"the tokenizer of {quoted(directory)} has ids up to {encoding.max_token_value}, but "
            f"the model's vocabulary has only {vocab_size}; they do not belong together"
        )
    return encoding


def openai_tokenizer() -> tiktoken.Encoding:
    """Return GPT-2's own tokenizer, from tiktoken's cache or by download."""
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # the type depends on the HTTP client
        raise NoTokenizerError(
            f"tiktoken could not get GPT-2's vocabulary ({type(error).__name__}); connect to the internet once, set "
            "TIKTOKEN_CACHE_DIR to a directory that has it, or put vocab.json and merges.txt beside the weights"
        ) from error


def byte_tokenizer() -> tiktoken.Encoding:
    """Return a tokenizer of the 256 bytes, where each byte is its own id and `<|endoftext|>` is 256."""
    import tiktoken

    ranks = {bytes([b]): b for b in range(256)}
    return tiktoken.Encoding("bytes", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256})


def character_tokenizer(characters: Iterable[str]) -> tiktoken.Encoding:
    """Return a tokenizer with one token per distinct character, in sorted order, as in nanoGPT's shakespeare_char.

    It has no special tokens. Encoding an unknown character or decoding an unknown id raises `TokenizerError`.

    Args:
        characters: a text, or its characters in any order; duplicates are ignored.
    """
    from bridge.tokenizers.characters import CharacterEncoding

    ids = {character: i for i, character in enumerate(sorted(set(characters)))}
    return CharacterEncoding("characters", ids, where="the tokenizer of characters")


def decode_known(encoding: tiktoken.Encoding, ids: Iterable[int]) -> str:
    """Decode ids to text. Ids without a token are skipped: a model with a padded vocabulary may sample them."""
    known: list[int] = []
    for i in ids:
        with suppress(KeyError, OverflowError, TokenizerError):
            encoding.decode_single_token_bytes(i)
            known.append(i)
    return encoding.decode(known)


def tokenizer_fingerprint(encoding: tiktoken.Encoding) -> str:
    """Return the SHA-256, in hex, of everything that determines the ids: pattern, ranks and special tokens.

    It does not depend on the files that the tokenizer was read from, on its name, or on the spelling of GPT-2's
    pattern.
    """
    pattern = WORDS if encoding._pat_str in SPELLINGS_OF_WORDS else encoding._pat_str
    ranks = sorted((i, token.hex()) for token, i in encoding._mergeable_ranks.items())
    special = sorted((i, token) for token, i in encoding._special_tokens.items())
    return hashlib.sha256(json.dumps([pattern, ranks, special]).encode()).hexdigest()


def _from_vocab_and_merges(directory: Path, vocab_size: int) -> tiktoken.Encoding | None:
    for vocab, merges in VOCAB_AND_MERGES:
        if has_companion(directory, vocab) and has_companion(directory, merges):
            return byte_level_bpe(
                directory.name,
                read_json_companion(directory, vocab, vocab_size, TokenizerError),
                _read_merges(directory, merges, vocab_size),
                special=_read_added_tokens(directory, vocab_size),
                where=quoted(directory),
            )
    return None


def from_tokenizer_json(directory: Path, vocab_size: int) -> tiktoken.Encoding | None:
    """Return the tokenizer in the `tokenizer.json` of `directory`, or None if there is no such file."""
    path = directory / "tokenizer.json"
    if not has_companion(directory, path.name):
        return None
    stored = read_json_companion(directory, path.name, vocab_size, TokenizerError)
    model, words = stored.get("model"), stored.get("pre_tokenizer")
    model = model if isinstance(model, dict) else {"type": None}
    kind = model.get("type", "BPE")
    if not ((kind == "BPE" and _is_byte_level(words)) or (kind == "WordLevel" and words == CHARACTERS_APART)):
        raise TokenizerError(
            f"{quoted(path)} is neither GPT-2's byte-level BPE nor a tokenizer of single characters written by "
            "bridge.save_tokenizer; no other kind is supported"
        )
    if stored.get("normalizer") is not None:
        raise TokenizerError(f"{quoted(path)} normalises text before encoding, which GPT-2 does not")
    vocab, special = model.get("vocab"), _added_tokens(stored.get("added_tokens"), path)
    if not isinstance(vocab, dict):
        raise _wrong_layout(path, "model.vocab is not an object")
    if kind == "BPE":
        require_plain_model(model, quoted(path))
        merges = _pairs(model.get("merges"), path)
        return byte_level_bpe(directory.name, vocab, merges, special, where=quoted(directory))
    from bridge.tokenizers.characters import CharacterEncoding

    require_special_tokens(special, vocab, quoted(path))
    return CharacterEncoding(directory.name, {**vocab, **special}, where=quoted(path))


def _added_tokens(listed: Any, path: Path) -> dict[str, Any]:
    """Return content -> id of the `added_tokens` of a `tokenizer.json`."""
    tokens = [] if listed is None else listed
    if not isinstance(tokens, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and "id" in token for token in tokens
    ):
        raise _wrong_layout(path, "added_tokens is not a list of objects with content and id")
    special = {token["content"]: token["id"] for token in tokens}
    if len(special) < len(tokens):
        raise _wrong_layout(path, "added_tokens has a token twice")
    return special


def _pairs(merges: Any, path: Path) -> list[tuple[str, ...]]:
    """Return the `merges` of a `tokenizer.json`. Each is two tokens, separated by a space or in a list."""
    if not isinstance(merges, list) or not all(isinstance(merge, str | list) for merge in merges):
        raise _wrong_layout(path, "model.merges is not a list of pairs")
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]


def _wrong_layout(path: Path, problem: str) -> TokenizerError:
    return TokenizerError(f"{quoted(path)} is not a valid tokenizer.json: {problem}")


def _is_byte_level(pre_tokenizer: Any) -> bool:
    return (
        isinstance(pre_tokenizer, dict)
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer.get("add_prefix_space", False) is False
        and pre_tokenizer.get("use_regex", True) is True
    )


def _read_added_tokens(directory: Path, vocab_size: int) -> dict[str, Any]:
    if not has_companion(directory, ADDED_TOKENS):
        return {}
    return read_json_companion(directory, ADDED_TOKENS, vocab_size, TokenizerError)


def _read_merges(directory: Path, name: str, vocab_size: int) -> list[tuple[str, ...]]:
    text = decoded(
        read_companion(directory, name, vocab_size, TokenizerError), quoted(directory / name), TokenizerError
    )
    if text.count("\n") > MOST_TOKENS:
        raise TokenizerError(f"{quoted(directory / name)} has more than {MOST_TOKENS} lines")
    return [tuple(line.split(" ")) for line in text.split("\n") if line and not line.startswith("#version")]

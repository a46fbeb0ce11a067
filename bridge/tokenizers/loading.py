"""Tokenizers of checkpoints: read from a checkpoint's directory, or built from bytes or characters.

`bridge.tokenizers.saving` writes the files that this module reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bridge.errors import NoTokenizerError, TokenizerError, quoted
from bridge.storage.companions import has_companion
from bridge.tokenizers.byte_level_bpe import END_OF_TEXT, ByteLevelBPE
from bridge.tokenizers.characters import CharacterTokenizer
from bridge.tokenizers.chat.templates import CHAT_TEMPLATE, chat_template_files
from bridge.tokenizers.readers.huggingface import VOCAB_AND_MERGES, Files, from_files
from bridge.tokenizers.readers.nanogpt import from_meta
from bridge.tokenizers.readers.sentencepiece_classes import FILES as SENTENCEPIECE
from bridge.tokenizers.tokenizer import AddedToken, SpecialTokens, Tokenizer
from bridge.tokenizers.validation import require_ids_below

VOCABULARY_FILES = (*VOCAB_AND_MERGES[0], *VOCAB_AND_MERGES[1], "tokenizer.json", "vocab.txt", *SENTENCEPIECE)
"""Files that can contain a vocabulary."""

TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
)
"""The tokenizer files that are copied with a checkpoint. `tokenizer_files_in` also returns files in folders."""

OPENAI_VOCAB_SIZE = 50257
"""The size of OpenAI's vocabulary, which tiktoken calls "gpt2"."""

OPENAI_ROWS = (OPENAI_VOCAB_SIZE, 50304)
"""A model with this vocabulary size and no tokenizer files uses OpenAI's tokenizer. nanoGPT pads 50257 to 50304."""

NO_LIMIT = 2**31
"""The assumed vocabulary size of a tokenizer whose model is unknown."""


def load_tokenizer(
    directory: Path,
    vocab_size: int,
    tokenizer_class: str | None = None,
    progress: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """Return the tokenizer saved in `directory`, or OpenAI's if nothing names another one.

    Args:
        vocab_size: the size of the model's vocabulary.
        tokenizer_class: the field of this name in the model's config.json.
        progress: `Checkpoint.progress`, which names the dataset of a nanoGPT checkpoint.

    Raises:
        NoTokenizerError: there is no tokenizer.
        TokenizerError: its files are damaged, of a kind that is not supported, or have ids outside the vocabulary.
    """
    files = Files(directory, vocab_size, tokenizer_class)
    tokenizer = from_files(files)
    if tokenizer is None:
        if found := [name for name in VOCABULARY_FILES if files.has(name)]:
            raise TokenizerError(
                f"{files.where} has {', '.join(found)}, but the tokenizer class {quoted(files.tokenizer_class)} cannot "
                "be read from it; save the tokenizer as tokenizer.json with transformers, into the same directory"
            )
        tokenizer = from_meta(directory, progress or {})
    if tokenizer is None:
        if not files.is_gpt2_class:
            raise NoTokenizerError(
                f"{files.where} names the tokenizer class {quoted(files.tokenizer_class)}, but has none of its files; "
                "add them, or work with token ids"
            )
        if vocab_size in OPENAI_ROWS:
            return openai_tokenizer()
        raise NoTokenizerError(
            f"{files.where} has no tokenizer: neither vocab.json with merges.txt, nor tokenizer.json, nor nanoGPT's "
            f"meta.pkl, and a vocabulary of {vocab_size} is not OpenAI's; add the files, or work with token ids"
        )
    require_ids_below(vocab_size, tokenizer.max_token_id, files.where)
    return tokenizer


def tokenizer_files_in(directory: Path) -> list[str]:
    """Return the tokenizer files in a directory and its folders, as relative paths with forward slashes."""
    return [*(name for name in TOKENIZER_FILES if has_companion(directory, name)), *chat_template_files(directory)]


def openai_tokenizer() -> ByteLevelBPE:
    """Return GPT-2's own tokenizer, from tiktoken's cache or by download."""
    import tiktoken

    try:
        return ByteLevelBPE.from_tiktoken(tiktoken.get_encoding("gpt2"))
    except Exception as error:  # the type depends on the HTTP client
        raise NoTokenizerError(
            f"tiktoken could not get GPT-2's vocabulary ({type(error).__name__}); connect to the internet once, set "
            "TIKTOKEN_CACHE_DIR to a directory that has it, or put vocab.json and merges.txt beside the weights"
        ) from error


def byte_tokenizer() -> ByteLevelBPE:
    """Return a tokenizer of the 256 bytes, where each byte is its own id and `<|endoftext|>` is 256."""
    ranks = {bytes([b]): b for b in range(256)}
    return ByteLevelBPE("bytes", ranks, [AddedToken(END_OF_TEXT, 256)], SpecialTokens(END_OF_TEXT, END_OF_TEXT))


def character_tokenizer(characters: Iterable[str]) -> CharacterTokenizer:
    """Return a tokenizer with one token per distinct character, in sorted order, as in nanoGPT's shakespeare_char.

    It has no special tokens. Encoding an unknown character raises `TokenizerError`.

    Args:
        characters: a text, or its characters in any order; duplicates are ignored.
    """
    ids = {character: i for i, character in enumerate(sorted(set(characters)))}
    return CharacterTokenizer("characters", ids, where="the tokenizer of characters")


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Return the SHA-256, in hex, of everything that determines the ids of a tokenizer.

    It depends neither on the files that the tokenizer was read from nor on its name.
    """
    return tokenizer.fingerprint

"""Write tokenizers as the files that `bridge.tokenizers.loading` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bridge.errors import CheckpointError, TokenizerError, quoted
from bridge.storage.atomic_writes import replace_files
from bridge.storage.companions import MOST_TOKENS, checked_companion
from bridge.tokenizers.byte_level_bpe import END_OF_TEXT, ByteLevelBPE
from bridge.tokenizers.chat.templates import chat_template_file, read_chat_templates
from bridge.tokenizers.loading import NO_LIMIT, VOCAB_AND_MERGES, load_tokenizer, tokenizer_files_in
from bridge.tokenizers.tokenizer import Tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: str | Path, *, overwrite: bool = False) -> None:
    """Write a tokenizer into `directory`, so that transformers' AutoTokenizer produces the same ids.

    A tokenizer that was read from a directory is written as the files of that directory, unchanged. Otherwise,
    byte-level BPE is written as `vocab.json`, `merges.txt` and `tokenizer.json`, and single characters as
    `tokenizer.json`, each with `tokenizer_config.json` and the chat templates. No other file of the directory changes.

    Args:
        tokenizer: the tokenizer to write.
        directory: the directory to write to.
        overwrite: replace the files of the tokenizer in the directory. If it has tokenizer files that are not written
            again, nothing is written, and the error lists them. Without `overwrite`, a directory with tokenizer files
            is an error.

    Raises:
        TokenizerError: the files cannot represent the tokenizer. Nothing is written.
        CheckpointError: the directory has tokenizer files that may not be replaced, or cannot be written to.
    """
    files: Mapping[str, str | bytes] = _generated(tokenizer) if tokenizer.source is None else _copied(tokenizer)
    directory = Path(directory)
    existing = tokenizer_files_in(directory)
    if existing and not (overwrite and _is_tokenizer(directory, existing)):
        why = (
            "are not a tokenizer that this project can read"
            if overwrite
            else "exist already; overwrite=True replaces them"
        )
        raise CheckpointError(
            f"{quoted(directory)}: {', '.join(existing)} {why}; choose another directory, or move them away"
        )
    if kept := [name for name in existing if name not in files]:
        raise CheckpointError(
            f"{quoted(directory)} has files of another tokenizer: {', '.join(kept)}; they would not be written again. "
            "Choose another directory, or move them away"
        )
    replace_files(directory, files)


def _copied(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the files that a tokenizer was read from."""
    source = tokenizer.source
    assert source is not None
    return {name: checked_companion(source, name, MOST_TOKENS) for name in tokenizer_files_in(source)}


def _is_tokenizer(directory: Path, existing: Sequence[str]) -> bool:
    """Whether the files `existing` are regular files of one tokenizer that this project reads."""
    pairs = [pair for pair in VOCAB_AND_MERGES if {*pair} & {*existing}]
    if len(pairs) > 1 or any((directory / name).is_symlink() for name in existing):
        return False
    try:
        load_tokenizer(directory, NO_LIMIT)
        for name in existing:
            checked_companion(directory, name, MOST_TOKENS)
        return True
    except (TokenizerError, CheckpointError):
        return False


def _generated(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the files of a tokenizer that was not read from a directory."""
    stored = tokenizer.pipeline()
    # GPT2Tokenizer would split text into words; the general class uses tokenizer.json as it is.
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    files = {"tokenizer.json": json.dumps(stored, ensure_ascii=False)}
    if tokenizer.chat_directory is not None:
        templates = read_chat_templates(tokenizer.chat_directory)
        files |= {chat_template_file(name): template.text for name, template in templates.items()}
    if isinstance(tokenizer, ByteLevelBPE):
        vocab, merges = stored["model"]["vocab"], stored["model"]["merges"]
        settings = {"tokenizer_class": "GPT2Tokenizer"} | _gpt2_settings(tokenizer)
        files |= {
            "vocab.json": json.dumps(vocab, ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        }
    return {**files, "tokenizer_config.json": json.dumps(settings, indent=2) + "\n"}


def _gpt2_settings(tokenizer: ByteLevelBPE) -> dict[str, Any]:
    roles = tokenizer.special.by_role()
    # GPT2Tokenizer gives <|endoftext|> to these roles if the file does not mention them.
    settings: dict[str, Any] = {f"{role}_token": roles.get(role) for role in ("bos", "eos")}
    settings["unk_token"] = roles.get("unk", END_OF_TEXT if END_OF_TEXT in tokenizer.added else None)
    settings |= {f"{role}_token": token for role, token in roles.items()}
    others = [token.content for token in tokenizer.added.values() if token.content not in settings.values()]
    if any(not token.special for token in tokenizer.added.values()):
        decoder = {str(token.id): asdict(token) for token in tokenizer.added.values()}
        settings["added_tokens_decoder"] = {i: {k: v for k, v in t.items() if k != "id"} for i, t in decoder.items()}
        others = [token for token in others if tokenizer.added[token].special]
    if tokenizer.add_prefix_space:
        settings["add_prefix_space"] = True
    return settings | ({"additional_special_tokens": others} if others else {})

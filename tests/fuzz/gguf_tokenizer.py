"""The tokenizer in a GGUF file, read by the `gguf` package and built with the `tokenizers` library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tokenizers
from fuzz import tokenizer_ids
from gguf import GGUFReader
from support.models import SMALLEST, random_checkpoint

import bridge
from bridge.tokenizers.tokenizer import Tokenizer


def samples(folder: Path) -> list[Path]:
    (folder / "beside").mkdir()
    tokenizer_ids.small_bpe().save(str(folder / "beside" / "tokenizer.json"))
    config = replace(SMALLEST, n_inner=None, vocab_size=tokenizer_ids.small_bpe().get_vocab_size(), n_embd=4, n_head=2)
    checkpoint = replace(random_checkpoint(config), path=folder / "beside")
    bridge.save(checkpoint, folder / "tokenizer.gguf", format="gguf")
    return [folder / "tokenizer.gguf"]


def mutable(source: Path) -> list[Path]:
    return [source]


def judge(source: Path) -> str:
    def ours() -> Tokenizer:
        return bridge.load(source).tokenizer()

    def theirs() -> tokenizers.Tokenizer:
        reader = GGUFReader(source)
        tokens, merges = (reader.get_field(f"tokenizer.ggml.{key}").contents() for key in ("tokens", "merges"))
        model = tokenizers.models.BPE(
            {token: i for i, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]
        )
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        return tokenizer

    return tokenizer_ids.judged(ours, theirs)

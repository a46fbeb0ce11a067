"""`tokenizer.json` of byte-level BPE and of characters, read by the `tokenizers` library."""

from __future__ import annotations

import json
import random
from pathlib import Path

import tokenizers
from fuzz import json_damage, tokenizer_ids

import bridge
from bridge.tokenizers.loading import load_tokenizer

ROWS = 400


def samples(folder: Path) -> list[Path]:
    for name in ("bpe", "texts", "characters"):
        (folder / name).mkdir()
    tokenizer_ids.small_bpe().save(str(folder / "bpe" / "tokenizer.json"), pretty=True)
    stored = json.loads((folder / "bpe" / "tokenizer.json").read_text())
    stored["model"]["merges"] = [
        pair.split(" ") if isinstance(pair, str) else pair for pair in stored["model"]["merges"]
    ]
    (folder / "texts" / "tokenizer.json").write_text(json.dumps(stored))
    for name in ("bpe", "texts"):  # the class that takes the file as it is, as the tokenizers library does
        (folder / name / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    bridge.save_tokenizer(bridge.character_tokenizer("".join(tokenizer_ids.DIFFICULT[5:10])), folder / "characters")
    return [folder / name for name in ("bpe", "texts", "characters")]


def mutable(source: Path) -> list[Path]:
    return [source / "tokenizer.json"]


def damage(content: bytes, file: Path, rng: random.Random) -> bytes:
    return json_damage.damaged_json(content, rng)


def judge(source: Path) -> str:
    file = source / "tokenizer.json"
    return tokenizer_ids.judged(lambda: load_tokenizer(source, ROWS), lambda: tokenizers.Tokenizer.from_file(str(file)))

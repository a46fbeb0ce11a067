"""JSON files that an export copies: settings of generation and of a tokenizer."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

from fuzz import json_damage
from support.models import SMALLEST, random_checkpoint

import bridge
from bridge.formats.directory import carry_files

FILES = {
    "generation_config.json": {"bos_token_id": 10, "eos_token_id": [10, 9], "temperature": 0.7, "do_sample": True},
    "tokenizer_config.json": {
        "tokenizer_class": "GPT2Tokenizer",
        "added_tokens_decoder": {"10": {"content": "<|endoftext|>", "special": True}},
        "model_max_length": 1024,
    },
    "special_tokens_map.json": {"eos_token": {"content": "<|endoftext|>", "lstrip": False}, "pad_token": "!"},
}


def samples(folder: Path) -> list[Path]:
    source = folder / "settings"
    source.mkdir()
    (folder / "copy").mkdir()
    for name, value in FILES.items():
        (source / name).write_text(json.dumps(value))
    return [source]


def mutable(source: Path) -> list[Path]:
    return [source / name for name in FILES]


def damage(content: bytes, file: Path, rng: random.Random) -> bytes:
    return json_damage.damaged_json(content, rng)


def judge(source: Path) -> str:
    """A copied file must have the same bytes, and be an object for any JSON reader."""
    copy = source.parent / "copy"
    try:
        carry_files(replace(random_checkpoint(SMALLEST), path=source), copy)
    except bridge.BridgeError:
        return "refused"
    for name in FILES:
        content = (source / name).read_bytes()
        assert (copy / name).read_bytes() == content
        assert isinstance(json.loads(content), dict)
    return "loaded"

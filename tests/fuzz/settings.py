"""JSON files that an export copies: settings of generation and of a tokenizer."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from fuzz import json_damage
from support.models import SMALLEST, random_checkpoint

import bridge
from bridge.formats.directory import carry_files
from bridge.generation.processors import LogitsProcessors

FILES = {
    "generation_config.json": {
        "bos_token_id": 10,
        "eos_token_id": [10, 9],
        "temperature": 0.7,
        "do_sample": True,
        "top_k": 5,
        "top_p": 0.9,
        "bad_words_ids": [[1, 2], [3]],
        "sequence_bias": [[[4], -1.5]],
        "suppress_tokens": [7],
        "max_length": 20,
        "exponential_decay_length_penalty": [2, 1.5],
        "early_stopping": "never",
        "min_new_tokens": 2,
    },
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
    """A copied file must have the same bytes, and be an object for any JSON reader. Settings are refused or valid."""
    copy, checkpoint = source.parent / "copy", replace(random_checkpoint(SMALLEST), path=source)
    try:
        carry_files(checkpoint, copy)
    except bridge.BridgeError:
        return "refused"
    with suppress(bridge.BridgeError):
        config = bridge.generation_defaults(checkpoint).config(1, max_new_tokens=2)
        config.check(SMALLEST, [[1]])
        LogitsProcessors.of(config, SMALLEST.vocab_size)
    for name in FILES:
        content = (source / name).read_bytes()
        assert (copy / name).read_bytes() == content
        assert isinstance(json.loads(content), dict)
    return "loaded"

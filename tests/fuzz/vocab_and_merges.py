"""`vocab.json`, `merges.txt` and `added_tokens.json`, read by the `tokenizers` library."""

from __future__ import annotations

import json
import random
from pathlib import Path

import tokenizers
from fuzz import json_damage, tokenizer_ids
from support.tokenizers_for_tests import END

from bridge.tokenizers.loading import load_tokenizer

ROWS = 400


def samples(folder: Path) -> list[Path]:
    source = folder / "tokenizer"
    source.mkdir()
    tokenizer_ids.small_bpe().model.save(str(source))
    (source / "added_tokens.json").write_text(json.dumps({"<|user|>": 300, "<|pad|>": 301, END: 0}))
    return [source]


def mutable(source: Path) -> list[Path]:
    return [source / name for name in ("vocab.json", "merges.txt", "added_tokens.json")]


def damage(content: bytes, file: Path, rng: random.Random) -> bytes:
    return _damaged_lines(content, rng) if file.suffix == ".txt" else json_damage.damaged_json(content, rng)


def judge(source: Path) -> str:
    def theirs() -> tokenizers.Tokenizer:
        model = tokenizers.models.BPE.from_file(str(source / "vocab.json"), str(source / "merges.txt"))
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        return tokenizer

    return tokenizer_ids.judged(lambda: load_tokenizer(source, ROWS), theirs)


def _damaged_lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.decode().split("\n")
    for _ in range(rng.choice((1, 1, 2))):
        at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        match rng.randrange(6):
            case 0 if len(lines) > 1:
                del lines[at]
            case 1:
                lines.insert(other, lines[at])
            case 2:
                lines[at], lines[other] = lines[other], lines[at]
            case 3:
                lines[at] = " ".join(reversed(lines[at].split(" ")))
            case 4:
                lines[at] = rng.choice(("", " ", "a", "a b c", "\u0120 \u0120", "a a", "\x1b[31m b", lines[at] + "\r"))
            case _:
                lines[at] += rng.choice(("a", " ", "\t", "\u2581"))
    return "\n".join(lines).encode()

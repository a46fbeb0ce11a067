"""`vocab.txt` of WordPiece, read by the `tokenizers` library."""

from __future__ import annotations

import random
from pathlib import Path

from fuzz import tokenizer_ids
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizing.kinds import chinese_wordpiece

from bridge.tokenizers.loading import load_tokenizer

ROWS = 400
_LINES = ("", " ", "a", "##", "##a", "the", "[UNK]", "[CLS]", "[unk]", "\u2003the", "the\u3000", "e" * 600, "\x1b[31m")


def samples(folder: Path) -> list[Path]:
    source = folder / "wordpiece"
    source.mkdir()
    chinese_wordpiece(source)
    return [source]


def mutable(source: Path) -> list[Path]:
    return [source / "vocab.txt"]


def damage(content: bytes, file: Path, rng: random.Random) -> bytes:
    lines = content.decode().split("\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        match rng.randrange(6):
            case 0 if len(lines) > 1:
                del lines[at]
            case 1:
                lines.insert(other, lines[at])
            case 2:
                lines[at], lines[other] = lines[other], lines[at]
            case 3:
                lines[at] = rng.choice(_LINES)
            case 4:
                lines[at] += rng.choice(("\r", "\n", "\v", "\f", "\x1c", "\x85", "\u2028", "\u200b", "a", "##", " "))
            case _:
                lines[at] = lines[at][1:]
    return "\n".join(lines).encode()


def judge(source: Path) -> str:
    def theirs() -> Tokenizer:
        tokenizer = Tokenizer(models.WordPiece.from_file(str(source / "vocab.txt"), unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    return tokenizer_ids.judged(lambda: load_tokenizer(source, ROWS), theirs)

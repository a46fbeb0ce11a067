"""Small hand-written tokenizers, and the texts on which tokenizers are compared."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiktoken

from bridge.tokenizers.byte_level_bpe import WORDS, ByteLevelBPE

END = "<|endoftext|>"
CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog doesn't mind; they'll say it's 12 o'clock.",
    "def forward(self, x):\n    return self.c_proj(torch.relu(self.c_fc(x)))\n\n\n",
    "naïve café — déjà vu, Ελληνικά και ελληνικά, привет привет, 日本語日本語",
] * 5
TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "\r\n\t \u00a0\u2003",
    "the",
    " the",
    "the quick  brown   fox",
    "   leading and trailing   ",
    "don't they'll we've I'm he'd it's 'quoted' DON'T",
    "line one\nline two\n\n\nline five\n   indented\n",
    "a1b22c333 3.14159 1,000,000 x²³ Ⅳ ١٢٣",
    "naïve café déjà ELLHNIKÁ Ελληνικά привет 日本語 한국어 עברית العربية हिन्दी",
    "e\u0301 vs \u00e9, ﬁ ligature, ß, İ, \u200b zero width \ufeff bom",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 emoji\U0001f9ff",
    "!!! ... ??? <html>&amp;</html> {}[]() #version: 0.2",
    "".join(map(chr, range(0x180))),
    "\x00\x01\x7f control",
    "x" * 500 + " " * 500,
    "the quick brown fox jumps over the lazy dog " * 20,
]

OPENAI_CACHE = Path(__file__).parents[3] / "shared" / "tiktoken-cache"
needs_openai_cache = pytest.mark.skipif(
    not OPENAI_CACHE.is_dir(), reason="needs tiktoken's cache of the gpt2 vocabulary in ../shared/tiktoken-cache"
)


def of_tiktoken(
    name: str, mergeable_ranks: Mapping[bytes, int], special_tokens: Mapping[str, int], pat_str: str = WORDS
) -> ByteLevelBPE:
    """The tokenizer of a `tiktoken.Encoding` with these arguments."""
    return ByteLevelBPE.from_tiktoken(
        tiktoken.Encoding(
            name, pat_str=pat_str, mergeable_ranks=dict(mergeable_ranks), special_tokens=dict(special_tokens)
        )
    )


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Return random texts of words, numbers, white space and any Unicode code points except surrogates."""
    draw = random.Random(seed)
    pieces = [
        *" \n\t\r0123456789'.,;(){}=_-\u00a0\u2028",
        "  ",
        "\n\n    ",
        "the",
        " dog",
        "'s",
        "'ll",
        "doesn't",
        "привет",
    ]
    texts = []
    for _ in range(count):
        anything = [chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])) for _ in range(20)]
        texts.append("".join(draw.choices(pieces + anything, k=draw.randrange(60))))
    return texts


def openai_files() -> tuple[Path, Path]:
    """Return OpenAI's `encoder.json` and `vocab.bpe`, which are found in tiktoken's cache by their first bytes."""
    beginnings = {path: path.read_bytes()[:8] for path in OPENAI_CACHE.iterdir()}
    encoder = [path for path, beginning in beginnings.items() if beginning.startswith(b"{")]
    merges = [path for path, beginning in beginnings.items() if beginning == b"#version"]
    if not (encoder and merges):
        pytest.skip("tiktoken's cache does not hold OpenAI's vocab.bpe and encoder.json")
    return encoder[0], merges[0]


def write_byte_tokenizer(directory: Path) -> None:
    """Write `vocab.json` with the 256 bytes, where the id is the byte, and a `merges.txt` without merges.

    The characters that represent bytes are GPT-2's (gpt-2/src/encoder.py). They are restated here, so that the reader
    is not tested against itself.
    """
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    moved = [b for b in range(256) if b not in plain]
    names = {b: chr(b) if b in plain else chr(256 + moved.index(b)) for b in range(256)}
    (directory / "vocab.json").write_text(json.dumps({names[b]: b for b in range(256)}), encoding="utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")

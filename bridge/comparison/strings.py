"""Difficult strings for tokenizers, on which two of them are compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bridge.tokenizers.characters import CharacterTokenizer
from bridge.tokenizers.tokenizer import Tokenizer

MOST_MARKERS = 500
"""Maximum number of added tokens in the strings. A tokenizer may have thousands."""

_FIXED = (
    "",
    "the",
    " the quick brown fox",
    "a  b   c    d",
    "  leading and trailing  ",
    "\n\n\n\t\t \r\n \v\f x \n",
    "no-break\u00a0em\u2003ideographic\u3000line\u2028paragraph\u2029zero\u200bmark\ufeffnext\x85",
    " " * 300 + "x" + "\n" * 300,
    "x" * 2000,
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "don't they'll we've I'm he'd it's 'quoted' DON'T THEY'LL can\u2019t",
    "3.14159 1,000,000 0xFF 1e-8 x²³ ½ Ⅳ ١٢٣ १२३ 一二三",
    "!!! ... ??? -- — {}[]()<>/\\|@#$%^&*+=~`:;\"' &amp; <html>",
    "def f(self, x):\n    if x >= 0 and not self.y:\n\treturn x[1:-1]  # half\n\n\nclass A(B): pass\n",
    'for (int i = 0; i < n; ++i) { a[i] += "\\n%d"; }',
    "naïve café déjà Ελληνικά привет עברית العربية हिन्दी ไทย 日本語 한국어 中文",
    "Ωδabcшж日本abc한국123שמ",
    "e\u0301 é ﬁ ß ẞ İ \u0131 ǆ Å \u212b \u1e9b\u0323 \u0644\u0627",
    "🙂👩\u200d👩\u200d👧🏳️\u200d🌈🇩🇪👍🏽",
    "\x00\x01\x07\x1b[31m\x7f\x80",
    "\ufffd\ufffe\uffff",
    "a\ud800b\udfffc",  # lone surrogates
    "\ud83d",
)

_PLANES = 17
_SURROGATES = range(0xD800, 0xE000)


def difficult_strings(markers: Iterable[str]) -> list[str]:
    """Return the strings: white space, long words, numbers, code, mixed scripts, lone surrogates, and all planes.

    Args:
        markers: the spellings of the added tokens. Each occurs inside words, alone, twice in a row, and truncated.
    """
    named = [marker for marker in dict.fromkeys(markers) if marker][:MOST_MARKERS]
    around = [f"a{marker}b {marker} c{marker}{marker}\n{marker[:-1]} {marker.upper()}" for marker in named]
    return [*_FIXED, *_samples_of_planes(), *around, "".join(named), " ".join(named)]


def encodable(text: str, tokenizer: Tokenizer) -> str:
    """Remove the characters that a character tokenizer lacks. Other tokenizers can encode every text."""
    if not isinstance(tokenizer, CharacterTokenizer):
        return text
    return "".join(character for character in text if tokenizer.id_of(character) is not None)


def _samples_of_planes() -> Iterator[str]:
    """Yield characters from every part of each plane of Unicode, without surrogates."""
    for plane in range(_PLANES):
        codes = range(plane << 16, (plane + 1) << 16, 0x397)  # about 70 for each plane, at different offsets of a page
        yield "".join(chr(code) for code in codes if code not in _SURROGATES)

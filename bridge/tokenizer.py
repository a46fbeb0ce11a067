"""A checkpoint directory's tokenizer as a `tiktoken.Encoding`.

GPT-2's tokenizer is byte-level BPE (Radford et al. 2019, section 2.2). It is stored as `vocab.json`
and `merges.txt`, or inside `tokenizer.json`; both spell bytes as printable characters.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.errors import NoTokenizerError, TokenizerError, quoted
from bridge.json_text import parse_object

if TYPE_CHECKING:
    import tiktoken

TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""What travels with a checkpoint so that its tokenizer does."""

OPENAI_VOCAB_SIZE = 50257
"""A model of exactly this vocabulary uses OpenAI's tokenizer, which tiktoken calls "gpt2"."""

# How GPT-2 cuts text into words before BPE; the same pattern in OpenAI's encoder.py and tiktoken.
_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def load_tokenizer(directory: Path, vocab_size: int) -> tiktoken.Encoding:
    """The tokenizer saved in `directory`, or OpenAI's where the vocabulary has its size.

    Raises `TokenizerError` where there is none, where it is not GPT-2's kind of byte-level BPE, or
    where it has ids that the model's vocabulary does not.
    """
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        vocab = _read_json(directory / "vocab.json")
        merges = _read_merges(directory / "merges.txt")
        added = directory / "added_tokens.json"
        encoding = _byte_level_bpe(directory, vocab, merges, special=_read_json(added) if added.is_file() else {})
    elif (directory / "tokenizer.json").is_file():
        encoding = _from_tokenizer_json(directory / "tokenizer.json")
    elif vocab_size == OPENAI_VOCAB_SIZE:
        encoding = openai_tokenizer()
    else:
        raise NoTokenizerError(
            f"{quoted(directory)} has no tokenizer: neither vocab.json with merges.txt nor tokenizer.json, and a "
            f"vocabulary of {vocab_size} is not OpenAI's; put the files there, or work with token ids"
        )
    if encoding.max_token_value >= vocab_size:
        raise TokenizerError(
            f"the tokenizer of {quoted(directory)} has ids up to {encoding.max_token_value}, "
            f"the model's vocabulary only {vocab_size}; they do not belong together"
        )
    return encoding


def openai_tokenizer() -> tiktoken.Encoding:
    """GPT-2's own tokenizer, from tiktoken's cache or by download."""
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the HTTP client of the day raises
        raise NoTokenizerError(
            f"tiktoken could not get GPT-2's vocabulary ({type(error).__name__}); connect once, set "
            "TIKTOKEN_CACHE_DIR to a folder that has it, or put vocab.json and merges.txt beside the weights"
        ) from error


def _from_tokenizer_json(path: Path) -> tiktoken.Encoding:
    stored = _read_json(path)
    model = stored.get("model")
    if (
        not isinstance(model, dict)
        or model.get("type", "BPE") != "BPE"
        or not _is_byte_level(stored.get("pre_tokenizer"))
    ):
        raise TokenizerError(f"{quoted(path)} is not GPT-2's byte-level BPE, the only kind that is read")
    if stored.get("normalizer"):
        raise TokenizerError(f"{quoted(path)} normalises text before encoding, which GPT-2 does not")
    try:
        vocab = dict(model["vocab"])
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        special = {token["content"]: token["id"] for token in stored.get("added_tokens") or []}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"{quoted(path)} is not laid out as a tokenizer.json: {quoted(repr(error))}") from None
    return _byte_level_bpe(path.parent, vocab, merges, special)


def _is_byte_level(pre_tokenizer: Any) -> bool:
    return (
        isinstance(pre_tokenizer, dict)
        and pre_tokenizer.get("type") == "ByteLevel"
        and not pre_tokenizer.get("add_prefix_space")
        and pre_tokenizer.get("use_regex", True)
    )


def _byte_level_bpe(
    directory: Path, vocab: Mapping[str, int], merges: list[tuple[str, ...]], special: Mapping[str, int]
) -> tiktoken.Encoding:
    """tiktoken ranks merges by the id of what they make, so ids must rise in the order of the merges."""
    import tiktoken

    byte_of = _printable_bytes()
    _require_pairs(directory, merges)
    merged = ["".join(pair) for pair in merges]
    ordinary = set(merged) | set(byte_of)
    for pair in merges:
        if unknown := [token for token in (*pair, "".join(pair)) if token not in ordinary or token not in vocab]:
            raise TokenizerError(
                f"{quoted(directory)}: the merge {quoted(' '.join(pair))} uses {quoted(unknown[0])}, which has no id "
                "or is made of neither bytes nor merges; only byte-level BPE is read"
            )
    _require_distinct_ids(directory, {**vocab, **special})
    special = {**{token: i for token, i in vocab.items() if token not in ordinary}, **special}
    ids = [vocab[token] for token in merged]
    if any(later <= earlier for earlier, later in pairwise(ids)):
        raise TokenizerError(
            f"{quoted(directory)}: token ids do not follow the order of the merges; tiktoken needs that"
        )
    ranks = {bytes(byte_of[c] for c in token): i for token, i in vocab.items() if token in ordinary}
    if len([token for token in ranks if len(token) == 1]) != 256:
        raise TokenizerError(
            f"{quoted(directory)}: some of the 256 bytes have no token, so not every text can be encoded"
        )
    return tiktoken.Encoding(name=directory.name, pat_str=_WORDS, mergeable_ranks=ranks, special_tokens=special)


def _require_pairs(directory: Path, merges: list[tuple[str, ...]]) -> None:
    for pair in merges:
        if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise TokenizerError(f"{quoted(directory)}: the merge {quoted(pair)} is not a pair of tokens")


def _require_distinct_ids(directory: Path, tokens: Mapping[str, int]) -> None:
    """tiktoken ends the process on what this refuses."""
    seen: dict[int, str] = {}
    for token, i in tokens.items():
        if not isinstance(token, str):
            raise TokenizerError(f"{quoted(directory)}: the token {quoted(token)} is not a text")
        if type(i) is not int or not 0 <= i < 2**31:
            raise TokenizerError(f"{quoted(directory)}: the id of {quoted(token)} is {quoted(i)}, not a whole number")
        if i in seen:
            raise TokenizerError(f"{quoted(directory)}: {quoted(seen[i])} and {quoted(token)} have one id, {i}")
        seen[i] = token


def _printable_bytes() -> dict[str, int]:
    """The character that stands for each byte: itself where it prints, else the next unused above 255.

    Source: `bytes_to_unicode` in OpenAI's gpt-2/src/encoder.py; restated.
    """
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + k): b for k, b in enumerate(others)}


def _read_merges(path: Path) -> list[tuple[str, ...]]:
    try:
        lines = _read_bytes(path).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{quoted(path)} is not UTF-8: {quoted(error)}") from None
    return [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]


def _read_json(path: Path) -> dict[str, Any]:
    return parse_object(_read_bytes(path), quoted(path), TokenizerError)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot read {quoted(path)}: {error.strerror}") from None

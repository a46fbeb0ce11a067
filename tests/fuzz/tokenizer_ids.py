"""Comparison of a mutant's tokenizer with that of the `tokenizers` library for the same files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import tokenizers
from support.tokenizers_for_tests import CORPUS, END, TEXTS

import bridge
from bridge.tokenizers.tokenizer import Tokenizer

DIFFICULT = [text for text in TEXTS if len(text) < 400] + CORPUS[:3]


@cache
def small_bpe() -> tokenizers.Tokenizer:
    """Return a byte-level BPE of 256 bytes, 30 merges and one special token. Damage reaches all of it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=287,
        special_tokens=[END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def judged(load: Callable[[], Tokenizer], theirs: Callable[[], tokenizers.Tokenizer]) -> str:
    """Return "refused", "loaded" if both give the same ids, or "only we load it" if `theirs` raises."""
    try:
        ours = load()
    except bridge.BridgeError:
        return "refused"
    ids = {text: _ids(ours, text) for text in DIFFICULT}
    try:
        tokenizer = theirs()
        tokenizer.no_truncation()  # transformers sets both for each call
        tokenizer.no_padding()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # panics in Rust are not Exceptions
        return "only we load it"
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()} | {*ours.added}
    for text in _without(added, ids):
        if (found := ids[text]) is not None:
            expected = tokenizer.encode(text, add_special_tokens=False).ids
            assert found == expected, f"{text!r} gives {found}, not {expected}"
            if tokenizer.decoder is not None:
                assert ours.decode(found) == tokenizer.decode(found, skip_special_tokens=False)
    return "loaded"


def _ids(ours: Tokenizer, text: str) -> list[int] | None:
    """Return the ids of a text, or None if a character tokenizer lacks one of its characters."""
    try:
        ids = ours.encode(text, special_tokens="as_text", add_special_tokens=False)
        ours.decode(ids)
        ours.encode(text)
    except bridge.TokenizerError:
        return None
    return ids


def _without(contents: Iterable[str], texts: Iterable[str]) -> list[str]:
    """Return the texts without added tokens: the two do not have the same ones.

    The added tokens of a SentencePiece model may have its sign for a space.
    """
    spellings = {content.replace("▁", " ").strip() for content in contents}
    return [text for text in texts if not any(spelling in text for spelling in spellings)]

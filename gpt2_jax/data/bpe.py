"""Byte-level BPE learned from a corpus with the `tokenizers` library, and used through tiktoken."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from bridge import TokenizerError
from bridge.tokenizers.byte_level_bpe import END_OF_TEXT, byte_level_bpe

if TYPE_CHECKING:
    import tiktoken

SMALLEST_VOCABULARY = 257
"""The 256 bytes and `<|endoftext|>`."""


def train_bpe(texts: Iterable[str], vocab_size: int) -> tiktoken.Encoding:
    """A tokenizer laid out as GPT-2's: the bytes, the merges in the order they were learned, `<|endoftext|>` last.

    `vocab_size` counts all three. A pair that occurs once is not merged, so a corpus too small for that
    many merges gives as many as it has: `n_vocab` of the result says. The same texts give the same
    tokenizer. Raises `TokenizerError` below 257 tokens, or for a text that is not Unicode.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        raise TokenizerError(
            f"a BPE vocabulary of {vocab_size} has no room for the 256 bytes and {END_OF_TEXT}; "
            f"ask for {SMALLEST_VOCABULARY} or more"
        )
    if isinstance(texts, str):
        raise TokenizerError("BPE is trained on several texts, not on one's characters; give [text]")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    try:
        tokenizer.train_from_iterator(texts, trainer)
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"a text of the corpus has half a character in it, which UTF-8 cannot hold: {error}"
        ) from None
    model = json.loads(tokenizer.to_str())["model"]
    special = {END_OF_TEXT: len(model["vocab"])}
    return byte_level_bpe(
        "bpe", model["vocab"], [tuple(pair) for pair in model["merges"]], special, "the BPE trained here"
    )

"""Training of byte-level BPE on a corpus, with the `tokenizers` library. tiktoken encodes with the result."""

from __future__ import annotations

import json
from collections.abc import Iterable

from bridge import TokenizerError
from bridge.tokenizers.byte_level_bpe import END_OF_TEXT, ByteLevelBPE, ranks_and_merges
from bridge.tokenizers.tokenizer import AddedToken, SpecialTokens

MIN_VOCAB_SIZE = 257
"""The 256 bytes and `<|endoftext|>`."""


def train_bpe(texts: Iterable[str], vocab_size: int) -> ByteLevelBPE:
    """Train a byte-level BPE tokenizer with the layout of GPT-2's.

    Its ids are the 256 bytes, then the merges in the order in which they were learned, then `<|endoftext|>`. The result
    depends only on the texts and `vocab_size`.

    Args:
        texts: the corpus.
        vocab_size: the number of all ids. Pairs that occur only once are not merged, so a small corpus may give fewer;
            see `vocab_size` of the result.

    Raises:
        TokenizerError: `vocab_size` is below 257, or a text cannot be encoded as UTF-8.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCAB_SIZE:
        raise TokenizerError(
            f"a BPE vocabulary of {vocab_size} has no room for the 256 bytes and {END_OF_TEXT}; "
            f"ask for {MIN_VOCAB_SIZE} or more"
        )
    if isinstance(texts, str):
        raise TokenizerError("BPE is trained on a list of texts; for a single text, give [text]")
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
            f"a text of the corpus has an unpaired surrogate, which UTF-8 cannot encode: {error}"
        ) from None
    model = json.loads(tokenizer.to_str())["model"]
    vocab, pairs = model["vocab"], [tuple(pair) for pair in model["merges"]]
    ranks, merges = ranks_and_merges(vocab, pairs, "the BPE trained here")
    end = AddedToken(END_OF_TEXT, len(vocab))
    return ByteLevelBPE("bpe", ranks, [end], SpecialTokens(END_OF_TEXT, END_OF_TEXT), merges=merges)

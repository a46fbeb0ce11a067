"""How special tokens in and around text become ids: in prompts, evaluation text and training text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from bridge.tokenizers.tokenizer import SpecialTokenPolicy, Tokenizer
from gpt2_jax.data.text.documents import Document

SpecialTokensFlag = Literal["match", "as-text", "error"]
"""The values of --special-tokens, with hyphens in place of underscores."""


def policy_of(flag: SpecialTokensFlag) -> SpecialTokenPolicy:
    """Convert the value of --special-tokens to the value of `special_tokens` in `Tokenizer.encode`."""
    return "as_text" if flag == "as-text" else flag


def around_documents(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids before and after each document: those around every text, and one end-of-sequence token."""
    before, after = map(list, tokenizer.around)
    end = list(tokenizer.eos_token_ids)
    return before, after if after[-len(end) :] == end else after + end


def blocks_to_encode(document: Document, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield a document in blocks. Their concatenated ids are those of the document.

    The whole document is one block if the tokenizer's ids depend on more than the words.
    """
    if tokenizer.splits_between_words:
        yield from document.blocks()
    elif text := "".join(document.blocks()):
        yield text

"""The text that `gpt2 eval` evaluates: its tokens, its documents, and its lengths in words and bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from bridge import BridgeError, Checkpoint
from bridge.errors import quoted
from bridge.evaluation import Progress, TokenizedText
from bridge.tokenizers.tokenizer import Tokenizer
from gpt2_jax.data import open_data
from gpt2_jax.data.text.documents import STDLIB, Documents, find_documents
from gpt2_jax.data.text.special_tokens import SpecialTokensFlag, around_documents, blocks_to_encode, policy_of
from gpt2_jax.data.tokens.files import SIDECAR
from gpt2_jax.data.tokens.stream import TokenStream, is_token_source


@dataclass(frozen=True)
class Text:
    """The evaluated text. Words are separated by white space, bytes are UTF-8; both are None if only ids are known."""

    ids: Int[np.ndarray, " N"]
    words: int | None = None
    bytes: int | None = None
    document_ends: Int[np.ndarray, " D"] | None = None
    """The position after the last token of each document; None if the source does not store it."""
    names: tuple[str, ...] | None = None
    """The path of each document inside the source; None for tokens."""
    counts: Bool[np.ndarray, " N"] | None = None
    """Whether each token counts in the loss; None if all do."""

    def tokenized(self, source: str, separate_documents: bool) -> TokenizedText:
        """Return what is evaluated. Records in which some tokens do not count are always evaluated separately."""
        if not separate_documents and self.counts is None:
            return TokenizedText(self.ids)
        return TokenizedText(self.ids, self.counts, self.require_documents("--separate-documents", source))

    def require_documents(self, flag: str, source: str) -> Int[np.ndarray, " D"]:
        """Return the ends of the documents. Raises `BridgeError` if the source does not store them."""
        if self.document_ends is None:
            raise BridgeError(
                f"{flag}: the token files {quoted(source)} do not store where documents end; give the text instead"
            )
        return self.document_ends


def read_text(
    source: str, checkpoint: Checkpoint, special_tokens: SpecialTokensFlag, max_tokens: int, advance: Progress
) -> Text:
    """Return the first `max_tokens` tokens of a source."""
    if source == STDLIB or not (is_token_source(source) or (Path(source) / SIDECAR).is_file()):
        return encode_documents(find_documents(source), checkpoint.tokenizer(), special_tokens, max_tokens, advance)
    opened = open_data(source, vocab_size=checkpoint.config.vocab_size, validation_fraction=0)
    stream = opened.train if opened.validation is None else opened.validation
    assert isinstance(stream, TokenStream)  # token files are never a mixture
    stop, ends = min(max_tokens, len(stream)), stream.document_ends
    counts = None if stream.counts is None else stream.counts.read(0, stop).astype(bool)
    if ends is not None:
        ends = np.append(ends[ends < stop], stop)
    return Text(stream.read(0, stop), document_ends=ends, counts=counts)


def encode_documents(
    documents: Documents, tokenizer: Tokenizer, special_tokens: SpecialTokensFlag, max_tokens: int, advance: Progress
) -> Text:
    """Return the first `max_tokens` tokens of documents of text."""
    pieces, words, size, total = [np.empty(0, np.int32)], 0, 0, 0
    ends: dict[str, int] = {}
    for name, ids, text in _pieces(documents, tokenizer, special_tokens):
        if len(ids) <= max_tokens - total:
            raw = text.encode()
        else:
            ids = ids[: max_tokens - total]
            raw = b"".join(map(tokenizer.token_bytes, ids)) if text else b""
        pieces.append(np.array(ids, np.int32))
        words += len(raw.decode(errors="ignore").split())  # pieces start at white space, so no word is split
        size += len(raw)
        total += len(ids)
        ends[name] = total
        advance(size, documents.size)
        if total == max_tokens:
            break
    return Text(np.concatenate(pieces), words, size, np.array([*ends.values()], np.int64), tuple(ends))


def _pieces(
    documents: Documents, tokenizer: Tokenizer, special_tokens: SpecialTokensFlag
) -> Iterator[tuple[str, list[int], str]]:
    """Yield the name of a document, ids and their text. The tokens around documents have no text."""
    before, after = around_documents(tokenizer)
    previous = None
    for document in documents.readable():
        if previous is not None:
            yield previous, after, ""
        yield document.name, before, ""
        for text in blocks_to_encode(document, tokenizer):
            ids = tokenizer.encode(text, special_tokens=policy_of(special_tokens), add_special_tokens=False)
            yield document.name, ids, text
        previous = document.name

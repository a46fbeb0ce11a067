"""Text as blocks of token ids, encoded on all cores and returned in order."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from jaxtyping import Bool, Int

from bridge.tokenizers.tokenizer import SpecialTokenPolicy, Tokenizer
from gpt2_jax.data.text.documents import Documents
from gpt2_jax.data.text.special_tokens import around_documents, blocks_to_encode

NO_ENDS = np.empty(0, np.int64)


@dataclass(frozen=True)
class Block:
    """The ids of a part of a document, or of several documents."""

    ids: Int[np.ndarray, " T"]
    counts: Bool[np.ndarray, " T"] | None = None
    """Whether each token counts in the loss. None: all do."""
    ends: Int[np.ndarray, " N"] = field(default_factory=lambda: NO_ENDS)
    """The number of ids up to the end of each document that ends in this block."""
    read: int = 0
    """The bytes of the files from which it was made, for progress."""
    files: int = 0
    """The number of files that end in this block."""
    bytes: int = 0
    """The bytes of its text in UTF-8."""
    characters: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """How many records were left out, by reason."""


Tasks = Iterator[Callable[[], Block]]


def run_in_order(tasks: Tasks) -> Generator[Block, None, None]:
    """Run tasks on all cores and yield their results in order. At most four tasks per core are waiting."""
    workers = os.cpu_count() or 1
    waiting: deque[Future[Block]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="tokenise") as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(task))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def text_blocks(documents: Documents, tokenizer: Tokenizer, special_tokens: SpecialTokenPolicy) -> Tasks:
    """Yield the tasks that encode all documents. They are read lazily.

    The tokens before and after a document are blocks without text.
    """
    before, after = (np.array(ids, np.uint32) for ids in around_documents(tokenizer))

    def encoded(text: str) -> Block:
        # An array, because threads would wait for the interpreter's lock to build a list.
        ids = tokenizer.encode_to_numpy(text, special_tokens=special_tokens, add_special_tokens=False)
        size = len(text.encode())
        return Block(ids, read=size, bytes=size, characters=len(text))

    for document in documents.readable():
        yield partial(Block, before)
        for text in blocks_to_encode(document, tokenizer):
            yield partial(encoded, text)
        yield partial(Block, after, ends=np.array([len(after)]), files=1)

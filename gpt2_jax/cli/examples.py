"""Training examples for reading: each token, and whether it counts in the loss."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
from rich.text import Text

from bridge import IGNORE_INDEX
from bridge.tokenizers.tokenizer import Tokenizer
from gpt2_jax.data import Batch

COUNTED_STYLE = "bold green"
LEGEND = "[tokens in brackets] count in the loss; | separates the others"


def shown_examples(batches: Iterator[Batch], number: int, tokenizer: Tokenizer | None) -> Iterator[Text]:
    """Yield a legend and the first examples of training batches.

    Args:
        tokenizer: None shows the ids.
    """
    yield Text(LEGEND)
    rows = ((batch, row) for batch in batches for row in range(len(batch["input_ids"])))
    for index, (batch, row) in enumerate(islice(rows, number), 1):
        ids, counts = _tokens(batch, row)
        yield Text.assemble((f"\nexample {index}: {len(ids)} tokens, of which {counts.sum()} count", "bold"))
        yield _marked([_spelling(id, tokenizer) for id in ids.tolist()], counts)


def _tokens(batch: Batch, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of an example, and whether each counts: whether it is the label of the token before it."""
    inputs, labels = batch["input_ids"][row], batch["labels"][row]
    if (mask := batch.get("attention_mask", batch.get("segment_ids"))) is not None:
        inputs, labels = inputs[mask[row] > 0], labels[mask[row] > 0]
    counts = np.concatenate([[False], labels != IGNORE_INDEX])
    ids = np.append(inputs, labels[-1])
    return (ids, counts) if counts[-1] else (ids[:-1], counts[:-1])


def _spelling(id: int, tokenizer: Tokenizer | None) -> str:
    return str(id) if tokenizer is None else tokenizer.decode([id]).replace("\n", "\\n")


def _marked(spellings: list[str], counts: np.ndarray) -> Text:
    text = Text()
    for index, (spelling, does_count) in enumerate(zip(spellings, counts, strict=True)):
        if does_count:
            text.append(f"[{spelling}]", COUNTED_STYLE)
        else:
            text.append(f"|{spelling}" if index and not counts[index - 1] else spelling)
    return text

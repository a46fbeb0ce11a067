"""What is unusual about a checkpoint although it loads: worth a look before it is trusted."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bridge.checkpoint import Checkpoint
from bridge.tokenizer import OPENAI_VOCAB_SIZE


def find_oddities(checkpoint: Checkpoint) -> list[str]:
    """A sentence for each; reads every tensor once, one at a time."""
    return [*checkpoint.oddities, *_in_config(checkpoint), *_in_values(checkpoint)]


def _in_config(checkpoint: Checkpoint) -> Iterator[str]:
    config = checkpoint.config
    if OPENAI_VOCAB_SIZE < config.vocab_size < OPENAI_VOCAB_SIZE + 256:
        yield f"vocab_size {config.vocab_size} is OpenAI's {OPENAI_VOCAB_SIZE} padded; the last rows may mean nothing"
    if config.activation_function != "gelu_new":
        yield f"activation {config.activation_function}, where GPT-2 has gelu_new"
    if not config.tie_word_embeddings:
        yield "the head is not tied to the token embedding, where GPT-2's is"
    if not config.bias:
        yield "no biases, where GPT-2 has them"


def _in_values(checkpoint: Checkpoint) -> Iterator[str]:
    for name, array in checkpoint.tensors.items():
        values = array if array.dtype.itemsize > 2 else array.astype(np.float32)
        bad = values.size - int(np.isfinite(values).sum())
        if bad:
            yield f"{name} has {bad} values that are not finite"
        elif not values.any() and not name.endswith("bias"):
            yield f"{name} is all zeros"

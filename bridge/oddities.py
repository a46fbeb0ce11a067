"""What is unusual about a checkpoint although it loads: worth a look before it is trusted."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.checkpoint import Checkpoint
from bridge.config import GPT2Config
from bridge.finite import count_not_finite
from bridge.tokenizer import OPENAI_VOCAB_SIZE


def find_oddities(checkpoint: Checkpoint) -> list[str]:
    """A sentence for each; reads every tensor once, one at a time."""
    return [*checkpoint.oddities, *_in_config(checkpoint.config), *_in_dtypes(checkpoint), *_in_values(checkpoint)]


def _in_config(config: GPT2Config) -> Iterator[str]:
    if OPENAI_VOCAB_SIZE < config.vocab_size < OPENAI_VOCAB_SIZE + 256:
        yield (
            f"vocab_size {config.vocab_size} is OpenAI's {OPENAI_VOCAB_SIZE} padded; the last rows may mean nothing "
            f"(gpt2 convert --vocab-size {OPENAI_VOCAB_SIZE} cuts them off)"
        )
    if config.activation_function != "gelu_new":
        yield f"activation {config.activation_function}, where GPT-2 has gelu_new"
    if not config.tie_word_embeddings:
        yield "the head is not tied to the token embedding, where GPT-2's is"
    if not config.bias:
        yield "no biases, where GPT-2 has them"


def _in_dtypes(checkpoint: Checkpoint) -> Iterator[str]:
    names: dict[str, list[str]] = {}
    for name, entry in checkpoint.tensors.entries.items():
        names.setdefault(str(entry.dtype), []).append(name)
    if len(names) > 1:
        counted = ", ".join(f"{dtype} in {len(those)} ({those[0]})" for dtype, those in names.items())
        yield f"mixed dtypes: {counted}; converting keeps each, computing casts all to one"
    if "float64" in names:
        yield "float64, which JAX cuts to float32 unless JAX_ENABLE_X64=1"


def _in_values(checkpoint: Checkpoint) -> Iterator[str]:
    for name, array in checkpoint.tensors.items():
        if bad := count_not_finite(array):
            yield f"{name} has {bad} values that are not finite"
        elif not array.any() and not name.endswith("bias"):
            yield f"{name} is all zeros"

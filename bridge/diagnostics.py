"""Inspection of a loaded checkpoint: warnings about unusual properties, and a fingerprint of the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np

from bridge.checkpoint import Checkpoint
from bridge.config import GPT2Config
from bridge.finite import count_not_finite
from bridge.storage.tensors import LazyTensorMap, contiguous
from bridge.tokenizers.loading import OPENAI_VOCAB_SIZE


def find_diagnostics(checkpoint: Checkpoint) -> list[str]:
    """Return one warning per unusual property, for the user to read before relying on the checkpoint.

    Reads every tensor once, one at a time.
    """
    return [*checkpoint.diagnostics, *_in_config(checkpoint.config), *_in_dtypes(checkpoint), *_in_values(checkpoint)]


def fingerprint(tensors: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256, in hex, of a set of weights. It does not depend on the file format.

    The digest covers names, dtypes, shapes and bytes of the tensors, sorted by name. Reads one tensor at a time.

    Args:
        tensors: canonical name -> array, for example `Checkpoint.tensors`.
    """
    digest = hashlib.sha256()
    lazy = LazyTensorMap.of(tensors)
    for name in sorted(lazy):
        array = contiguous(lazy[name])
        digest.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _in_config(config: GPT2Config) -> Iterator[str]:
    if OPENAI_VOCAB_SIZE < config.vocab_size < OPENAI_VOCAB_SIZE + 256:
        yield (
            f"vocab_size {config.vocab_size} is OpenAI's {OPENAI_VOCAB_SIZE} with padding; the last rows may be "
            f"unused (gpt2 convert --vocab-size {OPENAI_VOCAB_SIZE} removes them)"
        )
    if config.activation_function != "gelu_new":
        yield f"the activation is {config.activation_function}; GPT-2 uses gelu_new"
    if not config.tie_word_embeddings:
        yield "the head is not tied to the token embedding; GPT-2 ties them"
    if not config.bias:
        yield "the model has no biases; GPT-2 has them"


def _in_dtypes(checkpoint: Checkpoint) -> Iterator[str]:
    names: dict[str, list[str]] = {}
    for name, entry in checkpoint.tensors.entries.items():
        names.setdefault(str(entry.dtype), []).append(name)
    if len(names) > 1:
        counted = ", ".join(f"{dtype} in {len(group)} ({group[0]})" for dtype, group in names.items())
        yield f"mixed dtypes: {counted}; conversion keeps them; computation casts all tensors to one dtype"
    if "float64" in names:
        yield "float64 weights, which JAX casts to float32 unless JAX_ENABLE_X64=1"


def _in_values(checkpoint: Checkpoint) -> Iterator[str]:
    for name, array in checkpoint.tensors.items():
        if bad := count_not_finite(array):
            yield f"{name} has {bad} values that are not finite"
        elif not array.any() and not name.endswith("bias"):
            yield f"{name} is all zeros"

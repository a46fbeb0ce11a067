"""A checkpoint's model in JAX, in the precision that the checkpoint has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bridge import Checkpoint

if TYPE_CHECKING:
    from gpt2_jax.model import GPT2


@contextmanager
def jax_model(checkpoint: Checkpoint, vocab_multiple: int = 1) -> Iterator[tuple[GPT2, dict[str, Any]]]:
    """Yield the model and its parameters, in float64 if the checkpoint stores that, otherwise in float32."""
    import jax
    import jax.numpy as jnp

    import gpt2_jax

    wide = any(entry.dtype == "float64" for entry in checkpoint.tensors.entries.values())
    with jax.enable_x64(wide):
        dtype = jnp.float64 if wide else jnp.float32
        yield gpt2_jax.model_from_checkpoint(checkpoint, dtype=dtype, vocab_multiple=vocab_multiple)

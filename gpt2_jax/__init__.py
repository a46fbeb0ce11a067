"""GPT-2 in JAX (Flax Linen), functionally pure. Needs no torch. JAX is imported when a name is first used."""

from typing import TYPE_CHECKING

from gpt2_jax.lazy_names import lazy_names

if TYPE_CHECKING:
    from bridge import GPT2_SIZES, GPT2Config, __version__
    from gpt2_jax.evaluation import evaluate
    from gpt2_jax.generation import Decoder, generate
    from gpt2_jax.loading import checkpoint_from_params, from_pretrained, model_from_checkpoint
    from gpt2_jax.model import GPT2, FeedForward, GPT2Layer, MultiHeadAttention
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "bridge": ("GPT2_SIZES", "GPT2Config", "__version__"),
            "gpt2_jax.evaluation": ("evaluate",),
            "gpt2_jax.generation": ("Decoder", "generate"),
            "gpt2_jax.loading": ("checkpoint_from_params", "from_pretrained", "model_from_checkpoint"),
            "gpt2_jax.model": ("GPT2", "FeedForward", "GPT2Layer", "MultiHeadAttention"),
        },
    )

__all__ = [
    "GPT2",
    "GPT2_SIZES",
    "Decoder",
    "FeedForward",
    "GPT2Config",
    "GPT2Layer",
    "MultiHeadAttention",
    "__version__",
    "checkpoint_from_params",
    "evaluate",
    "from_pretrained",
    "generate",
    "model_from_checkpoint",
]

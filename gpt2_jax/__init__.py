"""GPT-2 in JAX (Flax Linen), as pure functions. Needs no torch. JAX is imported when a name is first used."""

from typing import TYPE_CHECKING

from gpt2_jax.lazy_names import lazy_names

if TYPE_CHECKING:
    from bridge import GPT2_SIZES, GenerationConfig, GPT2Config, __version__
    from gpt2_jax.classification import GPT2ForSequenceClassification, classifier_from_params, model_from_classifier
    from gpt2_jax.evaluation import evaluate
    from gpt2_jax.generation import Decoder, generate
    from gpt2_jax.loading import checkpoint_from_params, from_pretrained, model_from_checkpoint, sharded_params
    from gpt2_jax.loss import summed_loss
    from gpt2_jax.model import GPT2, FeedForward, GPT2Layer, MultiHeadAttention
    from gpt2_jax.ops.cross_entropy import cross_entropy, next_token_loss, summed_cross_entropy
    from gpt2_jax.ops.kv_cache import KVCache, empty_cache
    from gpt2_jax.parallel.sharding import make_mesh, shardings
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "bridge": ("GPT2_SIZES", "GPT2Config", "GenerationConfig", "__version__"),
            "gpt2_jax.classification": (
                "GPT2ForSequenceClassification",
                "classifier_from_params",
                "model_from_classifier",
            ),
            "gpt2_jax.evaluation": ("evaluate",),
            "gpt2_jax.generation": ("Decoder", "generate"),
            "gpt2_jax.loading": (
                "checkpoint_from_params",
                "from_pretrained",
                "model_from_checkpoint",
                "sharded_params",
            ),
            "gpt2_jax.loss": ("summed_loss",),
            "gpt2_jax.model": ("GPT2", "FeedForward", "GPT2Layer", "MultiHeadAttention"),
            "gpt2_jax.ops.cross_entropy": ("cross_entropy", "next_token_loss", "summed_cross_entropy"),
            "gpt2_jax.ops.kv_cache": ("KVCache", "empty_cache"),
            "gpt2_jax.parallel.sharding": ("make_mesh", "shardings"),
        },
    )

__all__ = [
    "GPT2",
    "GPT2_SIZES",
    "Decoder",
    "FeedForward",
    "GPT2Config",
    "GPT2ForSequenceClassification",
    "GPT2Layer",
    "GenerationConfig",
    "KVCache",
    "MultiHeadAttention",
    "__version__",
    "checkpoint_from_params",
    "classifier_from_params",
    "cross_entropy",
    "empty_cache",
    "evaluate",
    "from_pretrained",
    "generate",
    "make_mesh",
    "model_from_checkpoint",
    "model_from_classifier",
    "next_token_loss",
    "sharded_params",
    "shardings",
    "summed_cross_entropy",
    "summed_loss",
]

"""GPT-2 in JAX (Flax Linen), as pure functions. Needs no torch. JAX is imported when a name is first used."""

from typing import TYPE_CHECKING

from gpt2_jax.lazy_names import lazy_names

if TYPE_CHECKING:
    from bridge import GPT2_SIZES, GenerationConfig, GPT2Config, __version__
    from gpt2_jax.classification import GPT2ForSequenceClassification, classifier_from_params, model_from_classifier
    from gpt2_jax.evaluation import evaluate
    from gpt2_jax.finetuning.classification_scores import ClassificationScores, score_classification
    from gpt2_jax.finetuning.dpo import DPOLoss, dpo_loss, sequence_log_probs
    from gpt2_jax.generation import Decoder, generate
    from gpt2_jax.loading import checkpoint_from_params, from_pretrained, model_from_checkpoint, sharded_params
    from gpt2_jax.lora.config import LoRAConfig
    from gpt2_jax.lora.conversion import adapter_from_lora, lora_from_adapter
    from gpt2_jax.lora.parameters import lora_init, merge_lora
    from gpt2_jax.loss import summed_loss
    from gpt2_jax.model import GPT2, FeedForward, GPT2Layer, MultiHeadAttention
    from gpt2_jax.ops.cross_entropy import cross_entropy, next_token_loss, summed_cross_entropy
    from gpt2_jax.ops.kv_cache import KVCache, empty_cache
    from gpt2_jax.outputs import ModelOutputs, model_outputs
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
            "gpt2_jax.finetuning.classification_scores": ("ClassificationScores", "score_classification"),
            "gpt2_jax.finetuning.dpo": ("DPOLoss", "dpo_loss", "sequence_log_probs"),
            "gpt2_jax.evaluation": ("evaluate",),
            "gpt2_jax.generation": ("Decoder", "generate"),
            "gpt2_jax.loading": (
                "checkpoint_from_params",
                "from_pretrained",
                "model_from_checkpoint",
                "sharded_params",
            ),
            "gpt2_jax.lora.config": ("LoRAConfig",),
            "gpt2_jax.lora.conversion": ("adapter_from_lora", "lora_from_adapter"),
            "gpt2_jax.lora.parameters": ("lora_init", "merge_lora"),
            "gpt2_jax.loss": ("summed_loss",),
            "gpt2_jax.model": ("GPT2", "FeedForward", "GPT2Layer", "MultiHeadAttention"),
            "gpt2_jax.ops.cross_entropy": ("cross_entropy", "next_token_loss", "summed_cross_entropy"),
            "gpt2_jax.ops.kv_cache": ("KVCache", "empty_cache"),
            "gpt2_jax.outputs": ("ModelOutputs", "model_outputs"),
            "gpt2_jax.parallel.sharding": ("make_mesh", "shardings"),
        },
    )

__all__ = [
    "GPT2",
    "GPT2_SIZES",
    "ClassificationScores",
    "DPOLoss",
    "Decoder",
    "FeedForward",
    "GPT2Config",
    "GPT2ForSequenceClassification",
    "GPT2Layer",
    "GenerationConfig",
    "KVCache",
    "LoRAConfig",
    "ModelOutputs",
    "MultiHeadAttention",
    "__version__",
    "adapter_from_lora",
    "checkpoint_from_params",
    "classifier_from_params",
    "cross_entropy",
    "dpo_loss",
    "empty_cache",
    "evaluate",
    "from_pretrained",
    "generate",
    "lora_from_adapter",
    "lora_init",
    "make_mesh",
    "merge_lora",
    "model_from_checkpoint",
    "model_from_classifier",
    "model_outputs",
    "next_token_loss",
    "score_classification",
    "sequence_log_probs",
    "sharded_params",
    "shardings",
    "summed_cross_entropy",
    "summed_loss",
]

"""GPT-2 in PyTorch: the reference implementation. Needs no JAX."""

from bridge import GPT2_SIZES, GenerationConfig, GPT2Config, __version__
from gpt2_torch.classification import GPT2ForSequenceClassification, classifier_from_model, model_from_classifier
from gpt2_torch.evaluation import evaluate
from gpt2_torch.generation import Decoder, generate
from gpt2_torch.loading import checkpoint_from_model, from_pretrained, model_from_checkpoint
from gpt2_torch.loss import summed_loss
from gpt2_torch.model import GPT2, FeedForward, GPT2Layer, MultiHeadAttention
from gpt2_torch.ops.cross_entropy import cross_entropy, next_token_loss
from gpt2_torch.ops.kv_cache import KVCache, empty_cache
from gpt2_torch.outputs import ModelOutputs, model_outputs

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
    "ModelOutputs",
    "MultiHeadAttention",
    "__version__",
    "checkpoint_from_model",
    "classifier_from_model",
    "cross_entropy",
    "empty_cache",
    "evaluate",
    "from_pretrained",
    "generate",
    "model_from_checkpoint",
    "model_from_classifier",
    "model_outputs",
    "next_token_loss",
    "summed_loss",
]

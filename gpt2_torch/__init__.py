"""GPT-2 in PyTorch: the reference. Needs no JAX."""

from bridge import GPT2_SIZES, GPT2Config, __version__
from gpt2_torch.evaluation import evaluate
from gpt2_torch.generation import Decoder, generate
from gpt2_torch.loading import checkpoint_from_model, model_from_checkpoint
from gpt2_torch.model import GPT2, FeedForward, GPT2Layer, MultiHeadAttention

__all__ = [
    "GPT2",
    "GPT2_SIZES",
    "Decoder",
    "FeedForward",
    "GPT2Config",
    "GPT2Layer",
    "MultiHeadAttention",
    "__version__",
    "checkpoint_from_model",
    "evaluate",
    "generate",
    "model_from_checkpoint",
]

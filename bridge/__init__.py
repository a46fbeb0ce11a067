"""The bridge between the two backends: configurations, names, shapes and files.

It imports neither JAX nor PyTorch.
"""

from bridge.adapters.lora import LoRA, merge_lora
from bridge.checkpoint import Checkpoint
from bridge.config import GPT2_SIZES, GPT2Config
from bridge.conversion import canonicalize, stack_layers, to_flax, to_torch, unstack_layers
from bridge.diagnostics import find_diagnostics, fingerprint
from bridge.errors import BridgeError, CheckpointError, ConfigError, ConversionError, NoTokenizerError, TokenizerError
from bridge.evaluation import IGNORE_INDEX
from bridge.formats.peft import load_lora, save_lora
from bridge.formats.sequence_classifier import SequenceClassifier, load_classifier, new_classifier, save_classifier
from bridge.generation.config import GenerationConfig
from bridge.generation.defaults import GenerationDefaults, generation_defaults
from bridge.generation.scoring import LogLikelihood, loglikelihood
from bridge.generation.text import TextOutput, generate_text, stream_text
from bridge.io import BUNDLED, load, save
from bridge.names import canonical_names
from bridge.parameter_table import PARAMETERS, num_parameters, padded_vocab_size, parameters
from bridge.tokenizers.loading import byte_tokenizer, character_tokenizer, tokenizer_fingerprint
from bridge.tokenizers.saving import save_tokenizer
from bridge.tokenizers.tokenizer import AddedToken, SpecialTokens, Tokenizer
from bridge.vocabulary import resize_vocabulary

__version__ = "0.2.0"
"""The version of all three packages, which are released as one. pyproject.toml takes it from here."""

__all__ = [
    "BUNDLED",
    "GPT2_SIZES",
    "IGNORE_INDEX",
    "PARAMETERS",
    "AddedToken",
    "BridgeError",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "ConversionError",
    "GPT2Config",
    "GenerationConfig",
    "GenerationDefaults",
    "LoRA",
    "LogLikelihood",
    "NoTokenizerError",
    "SequenceClassifier",
    "SpecialTokens",
    "TextOutput",
    "Tokenizer",
    "TokenizerError",
    "__version__",
    "byte_tokenizer",
    "canonical_names",
    "canonicalize",
    "character_tokenizer",
    "find_diagnostics",
    "fingerprint",
    "generate_text",
    "generation_defaults",
    "load",
    "load_classifier",
    "load_lora",
    "loglikelihood",
    "merge_lora",
    "new_classifier",
    "num_parameters",
    "padded_vocab_size",
    "parameters",
    "resize_vocabulary",
    "save",
    "save_classifier",
    "save_lora",
    "save_tokenizer",
    "stack_layers",
    "stream_text",
    "to_flax",
    "to_torch",
    "tokenizer_fingerprint",
    "unstack_layers",
]

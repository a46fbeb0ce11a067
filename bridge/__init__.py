"""The bridge between the two backends: configurations, names, shapes and files; numpy only."""

from bridge.checkpoint import Checkpoint
from bridge.config import GPT2_SIZES, GPT2Config
from bridge.convert import canonical_names, canonicalize, stack_layers, to_flax, to_torch, unstack_layers
from bridge.errors import BridgeError, CheckpointError, ConfigError, ConversionError, NoTokenizerError, TokenizerError
from bridge.io import load, save
from bridge.oddities import find_oddities
from bridge.params import PARAMETERS, num_parameters, padded_vocab_size, parameters

__all__ = [
    "GPT2_SIZES",
    "PARAMETERS",
    "BridgeError",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "ConversionError",
    "GPT2Config",
    "NoTokenizerError",
    "TokenizerError",
    "canonical_names",
    "canonicalize",
    "find_oddities",
    "load",
    "num_parameters",
    "padded_vocab_size",
    "parameters",
    "save",
    "stack_layers",
    "to_flax",
    "to_torch",
    "unstack_layers",
]

"""Training data: from text or token files to batches of token ids."""

from gpt2_jax.data.batches import Batch, evaluation_batches, training_batches
from gpt2_jax.data.dataset import Data, open_data
from gpt2_jax.data.errors import DataError
from gpt2_jax.data.token_cache import TaskProgress, cache_directory
from gpt2_jax.data.token_stream import TokenStream
from gpt2_jax.data.tokenizers import make_tokenizer

__all__ = [
    "Batch",
    "Data",
    "DataError",
    "TaskProgress",
    "TokenStream",
    "cache_directory",
    "evaluation_batches",
    "make_tokenizer",
    "open_data",
    "training_batches",
]

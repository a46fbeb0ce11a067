"""From what `--data` names to batches of token ids."""

from gpt2_jax.console.cache import cache_directory
from gpt2_jax.data.errors import DataError
from gpt2_jax.data.open import Data, open_data
from gpt2_jax.data.tokenize import TaskProgress
from gpt2_jax.data.tokenizers import make_tokenizer
from gpt2_jax.data.tokens import TokenStream
from gpt2_jax.data.windows import Batch, evaluation_batches, training_batches

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

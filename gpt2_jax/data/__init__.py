"""Training data: from text or token files to batches of token ids. Modules are imported when a name is first used."""

from typing import TYPE_CHECKING

from gpt2_jax.lazy_names import lazy_names

if TYPE_CHECKING:
    from gpt2_jax.console.cache import cache_directory
    from gpt2_jax.data.batches import Batch, evaluation_batches, training_batches
    from gpt2_jax.data.dataset import Data, open_data
    from gpt2_jax.data.errors import DataError
    from gpt2_jax.data.records.schema import RecordOptions
    from gpt2_jax.data.text.tokenizers import make_tokenizer
    from gpt2_jax.data.tokens.cache_writer import TaskProgress
    from gpt2_jax.data.tokens.stream import TokenStream
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "gpt2_jax.console.cache": ("cache_directory",),
            "gpt2_jax.data.errors": ("DataError",),
            "gpt2_jax.data.dataset": ("Data", "open_data"),
            "gpt2_jax.data.records.schema": ("RecordOptions",),
            "gpt2_jax.data.tokens.cache_writer": ("TaskProgress",),
            "gpt2_jax.data.text.tokenizers": ("make_tokenizer",),
            "gpt2_jax.data.tokens.stream": ("TokenStream",),
            "gpt2_jax.data.batches": ("Batch", "evaluation_batches", "training_batches"),
        },
    )

__all__ = [
    "Batch",
    "Data",
    "DataError",
    "RecordOptions",
    "TaskProgress",
    "TokenStream",
    "cache_directory",
    "evaluation_batches",
    "make_tokenizer",
    "open_data",
    "training_batches",
]

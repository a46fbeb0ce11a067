"""From what `--data` names to batches of token ids. Modules are imported when a name is first used."""

from typing import TYPE_CHECKING

from gpt2_jax.lazy_names import lazy_names

if TYPE_CHECKING:
    from gpt2_jax.console.cache import cache_directory
    from gpt2_jax.data.errors import DataError
    from gpt2_jax.data.open import Data, open_data
    from gpt2_jax.data.tokenize import TaskProgress
    from gpt2_jax.data.tokenizers import make_tokenizer
    from gpt2_jax.data.tokens import TokenStream
    from gpt2_jax.data.windows import Batch, evaluation_batches, training_batches
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "gpt2_jax.console.cache": ("cache_directory",),
            "gpt2_jax.data.errors": ("DataError",),
            "gpt2_jax.data.open": ("Data", "open_data"),
            "gpt2_jax.data.tokenize": ("TaskProgress",),
            "gpt2_jax.data.tokenizers": ("make_tokenizer",),
            "gpt2_jax.data.tokens": ("TokenStream",),
            "gpt2_jax.data.windows": ("Batch", "evaluation_batches", "training_batches"),
        },
    )

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

"""The difference of two checkpoints: everything that `bridge.comparison` compares, and the function in JAX."""

from typing import TYPE_CHECKING

from gpt2_jax.lazy_names import lazy_names

if TYPE_CHECKING:
    from gpt2_jax.diff.compare import diff
    from gpt2_jax.diff.function import FunctionComparison, compare_functions
    from gpt2_jax.diff.result import Diff
else:
    # Imported on first use, because only the comparison of the function needs JAX.
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "gpt2_jax.diff.compare": ("diff",),
            "gpt2_jax.diff.function": ("FunctionComparison", "compare_functions"),
            "gpt2_jax.diff.result": ("Diff",),
        },
    )

__all__ = ["Diff", "FunctionComparison", "compare_functions", "diff"]
